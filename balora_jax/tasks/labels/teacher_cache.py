"""The teacher's logits of a training set on disk, so that a resumed run need not compute them."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from balora_jax.io.folders import replaced_file
from balora_jax.training.workdir import TEACHER


class TeacherCache:
    """One file beside a run, valid for one teacher, data set and precision.

    Args:
        folder: of the run.
        base: fingerprint of the checkpoint.
        own: what the teacher has beside the checkpoint, by path: its head, and its adapters.
        examples: digest of the encoded rows and their order.
        dtype: what the frozen forward computes in.
        length: tokens that rows are padded to.
    """

    def __init__(
        self,
        folder: Path,
        *,
        base: str,
        own: Mapping[str, np.ndarray],
        examples: str,
        dtype: str,
        length: int,
    ):
        self.file = folder / TEACHER
        digest = hashlib.sha256(f"{base}|{examples}|{dtype}|{length}".encode())
        for path in sorted(own):
            digest.update(path.encode() + np.asarray(own[path]).tobytes())
        self.key = digest.hexdigest()

    def read(self) -> np.ndarray | None:
        """The logits [rows, C], or None where there are none of this key."""
        if not self.file.is_file():
            return None
        try:
            with safe_open(self.file, framework="np") as stored:
                if (stored.metadata() or {}).get("key") != self.key:
                    return None
                return stored.get_tensor("logits")
        except SafetensorError:  # cut short by a kill: computed again
            return None

    def write(self, logits: np.ndarray) -> None:
        """Keep the logits, whole or not at all."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(self.file) as draft:
            draft.write_bytes(save({"logits": logits}, metadata={"key": self.key}))
