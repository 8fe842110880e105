"""A function of every row of a labelled set, batch by batch, in order."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from balora_jax.data.labelled import LabelledExample, labelled_epoch
from balora_jax.parallel import hosts
from balora_jax.parallel.sharding import rows_sharding

SHOW_PROGRESS_ABOVE = 500
NAMES = ("input_ids", "attention_mask", "token_type_ids")


def over_rows(
    forward: Callable[..., Any],
    parts: Any,
    examples: Sequence[LabelledExample],
    *,
    batch_size: int,
    length: int,
    pad_id: int,
    mesh: Mesh,
    title: str,
) -> np.ndarray:
    """``forward(parts, input_ids, attention_mask, token_type_ids)`` [B, C] of all rows: [rows, C].

    ``forward`` is jitted by the caller; it sees one shape. With a progress bar on long sets.
    """
    place, found = rows_sharding(mesh), []
    quiet = len(examples) < SHOW_PROGRESS_ABOVE or not hosts.is_first()
    with tqdm(total=len(examples), desc=title, unit="row", disable=quiet) as bar:
        for batch in labelled_epoch(examples, batch_size, length, pad_id):
            arrays = [hosts.place(batch[name], place) for name in NAMES]
            real = batch["row"] >= 0
            found.append(hosts.gathered(forward(parts, *arrays))[real])
            bar.update(int(real.sum()))
    return np.concatenate(found)
