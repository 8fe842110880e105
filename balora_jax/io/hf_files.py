"""The files of a Hugging Face checkpoint: found, checked to be safe and whole, identified."""

import glob
import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors then returns)
import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

from balora_jax.errors import InputError
from balora_jax.io.torch_files import TorchFile, open_torch
from balora_jax.paths import kind_of
from balora_jax.untyped.json_text import read_object
from balora_jax.untyped.shown import shown

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TORCH_FILE = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_FILES = (SINGLE_FILE, "*.json", "*.model", "*.model.v*", "*.txt", "*.jinja")
# As transformers looks for them: the first that is there is read.
_WEIGHTS = ((SINGLE_FILE, INDEX_FILE), (TORCH_FILE, TORCH_INDEX))
_OTHER_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".safetensors", ".h5", ".msgpack", ".gguf")
_CONVERT = (
    "Convert it once: AutoModelForCausalLM.from_pretrained(...)"
    ".save_pretrained(folder, safe_serialization=True)."
)
_LISTED = 8
_LONGEST_NAME = 1000
_HASH_WHOLE_BYTES = 64 * 2**20
_SAMPLE_BYTES = 64 * 2**10
_SAMPLES = 64


@dataclass(frozen=True)
class Window:
    """Where a matrix lies in a stored tensor of three dimensions: which, and from which row on."""

    number: int
    first: int


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of an open checkpoint: its description, and the handle that reads it.

    With a ``window`` it is some rows of one matrix of the stored tensor.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    handle: Any
    window: Window | None = None

    @property
    def itemsize(self) -> int:
        """Bytes of one stored number (``F8_E4M3`` → 1, ``BF16`` → 2, ``F32`` → 4, ``BOOL`` → 1)."""
        bits = re.search(r"\d+", self.dtype)
        return max(1, int(bits.group()) // 8) if bits else 1

    @contextmanager
    def mapped(self) -> Iterator[Any]:
        """What reads its rows and columns, from its file mapped anew.

        So that what was read of other tensors need not stay in memory.
        """
        again = isinstance(self.handle, TorchFile)  # maps the file whenever it reads
        with nullcontext(self.handle) if again else open_safetensors(self.file) as handle:
            part = handle.get_slice(self.name)
            yield part if self.window is None else _Seen(part, self.window)

    def value(self) -> np.ndarray:
        """The whole tensor."""
        if self.window is None:
            return self.handle.get_tensor(self.name)
        with self.mapped() as part:
            return part[tuple(slice(0, size) for size in self.shape)]


@dataclass(frozen=True)
class _Seen:
    """A window that rows and columns are read through."""

    part: Any
    window: Window

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        rows, columns = index
        number, first = self.window.number, self.window.first
        rows = slice(rows.start + first, rows.stop + first)
        return self.part[slice(number, number + 1), rows, columns][0]


def find_checkpoint(
    name_or_path: str | Path, revision: str | None = None, *, weights: bool = True
) -> Path:
    """Folder of a checkpoint: a local folder as it is, or a Hub name downloaded to the cache.

    JSON and tokenizer files of the repository's top level are downloaded, and its weights:
    ``model.safetensors``, or whatever its index names, or where there is neither the same of
    torch's files. Where no ``weights`` are wanted, the ``config.json`` alone. Of several processes
    on one machine one downloads a file, the others wait for it.

    Raises:
        InputError: no such folder or repository, no network, no ``config.json``, or no weights
            beside it.
    """
    name = str(name_or_path)
    folder = Path(name).expanduser()
    kind = kind_of(folder)
    if kind == "folder":
        if revision is not None:
            raise InputError(
                f"{name}: expected no revision for a local folder, got {shown(revision)}. "
                "Remove it."
            )
    elif kind is not None:
        raise InputError(f"{name}: expected a checkpoint folder, got a file. Name its folder.")
    elif name.startswith((".", "~")) or not _HUB_NAME.fullmatch(name):
        raise InputError(f"{name}: expected a checkpoint folder, got nothing. Check the path.")
    else:
        folder = _download(name, revision, _HUB_FILES if weights else (CONFIG_FILE,))
        wanted = _still_wanted(folder) if weights else []
        if wanted:
            # Of the same commit, though the branch may have moved.
            commit = folder.name if _COMMIT.fullmatch(folder.name) else revision
            folder = _download(name, commit, wanted)
    _check_folder(folder, weights)
    return folder


def _still_wanted(folder: Path) -> list[str]:
    """Patterns of the weight files, once all but a ``model.safetensors`` are downloaded."""
    if (folder / SINGLE_FILE).is_file():
        return []
    for index in (folder / INDEX_FILE, folder / TORCH_INDEX):
        if index.is_file():
            return [glob.escape(file) for file in sorted(set(_weight_map(index).values()))]
    return [TORCH_FILE]


def _download(name: str, revision: str | None, files: Sequence[str]) -> Path:
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(files),
                ignore_patterns=["*/*"],  # "*" also matches "/": originals in subfolders stay out
            )
        )
    except GatedRepoError as error:
        raise InputError(
            f"{name}: expected access to this gated repository, got a refusal. "
            "Accept its licence on the Hub and log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(
            f"{name}: expected an existing revision, got {revision!r}. Check the revision."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(
            f"{name}: expected a local folder or a Hub repository, got neither. Check the name "
            "(a private repository needs `hf auth login`)."
        ) from error
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"{name}: expected a local folder, a cached copy or a reachable Hub, got none of "
            "them. Check the path, or the network."
        ) from error
    except (HTTPError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{name}: expected to download it, got {reason!r}. Check the network and the disk."
        ) from error


def _check_folder(folder: Path, weights: bool) -> None:
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(
            f"{folder}: expected {CONFIG_FILE}, got none. Name the folder that holds the model."
        )
    if weights and not any((folder / name).is_file() for pair in _WEIGHTS for name in pair):
        raise _no_weights(folder)


def _no_weights(folder: Path) -> InputError:
    others = sorted(p.name for p in folder.iterdir() if p.suffix in _OTHER_SUFFIXES)
    got = f"only {shortened(others)}" if others else "no weights"
    return InputError(
        f"{folder}: expected {SINGLE_FILE}, {TORCH_FILE} or the index of either, got {got}. "
        f"{_CONVERT}"
    )


def read_json_config(folder: str | Path) -> dict[str, Any]:
    """The checkpoint's ``config.json`` as a dict."""
    return read_object(Path(folder) / CONFIG_FILE)


def weight_files(folder: str | Path) -> dict[Path, dict[str, str] | None]:
    """Weight files of a checkpoint, each with what the index says of them (None: no index).

    Raises:
        InputError: no weights, an index that is malformed or points outside its folder, or a
            shard that is not there.
    """
    folder = Path(folder)
    for single, index in ((folder / single, folder / index) for single, index in _WEIGHTS):
        if single.is_file():
            return {single: None}
        if index.is_file():
            return _shards(index)
    raise _no_weights(folder)


def _shards(index: Path) -> dict[Path, dict[str, str] | None]:
    names = _weight_map(index)
    files = sorted(set(names.values()))
    absent = [file for file in files if kind_of(index.parent / file) != "file"]
    if absent:
        raise InputError(
            f"{index}: expected {len(files)} weight files, got {len(absent)} missing "
            f"({shortened(absent)}). Download the checkpoint again."
        )
    return {index.parent / file: names for file in files}


def _weight_map(index: Path) -> dict[str, str]:
    """From names of tensors to files beside the index."""
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(f, str) for f in names.values()):
        raise InputError(
            f"{index}: expected a weight_map of names to files, got none. Download it again."
        )
    for file in sorted(set(names.values())):
        if _points_outside(file):
            raise InputError(
                f"{index}: expected files of its own folder, got {shown(file)}. "
                "Do not use this checkpoint: its index points outside."
            )
        if not file or PurePosixPath(file).name != file or PureWindowsPath(file).name != file:
            raise InputError(
                f"{index}: expected files beside it, got {shown(file)}. Move the weights beside "
                "the index and name them so there."
            )
    return names


def _points_outside(file: str) -> bool:
    """Lexical on purpose: the Hub's cache itself consists of links to blobs elsewhere."""
    posix, windows = PurePosixPath(file), PureWindowsPath(file)
    absolute = posix.is_absolute() or bool(windows.drive or windows.root)
    return absolute or ".." in posix.parts or ".." in windows.parts


@contextmanager
def open_tensors(folder: str | Path) -> Iterator[dict[str, StoredTensor]]:
    """All tensors of a checkpoint by name, each file opened once and closed at the end.

    Raises:
        InputError: as :func:`weight_files`, or a file that is truncated or not of its format.
    """
    folder = Path(folder)
    with ExitStack() as stack:
        tensors: dict[str, StoredTensor] = {}
        for file, index in weight_files(folder).items():
            handle = stack.enter_context(_open_weights(file))
            for name in handle.keys():  # noqa: SIM118  (a handle is not a mapping)
                # Where two files hold one name, the index decides.
                if index is not None and folder / index.get(name, file.name) != file:
                    continue
                part = handle.get_slice(name)
                shape, dtype = tuple(part.get_shape()), str(part.get_dtype())
                tensors[name] = StoredTensor(name, file, shape, dtype, handle)
        yield tensors


def _open_weights(file: Path) -> AbstractContextManager[Any]:
    """A handle of a file in the format that its name says, as transformers takes it."""
    return open_safetensors(file) if file.suffix == ".safetensors" else open_torch(file)


@contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """``safe_open`` for NumPy, with a broken file named in one sentence."""
    try:
        opened = safe_open(str(file), framework="np")
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file}: expected a complete safetensors file, got {error}. Download it again."
        ) from error
    with opened as handle:
        longest = max(handle.keys(), key=len, default="")
        if len(longest) > _LONGEST_NAME:  # some patterns take the square of a name's length
            raise InputError(
                f"{file}: expected names of at most {_LONGEST_NAME} characters, got "
                f"{shown(longest)}, which has {len(longest)}. Download it again."
            )
        yield handle


def fingerprint(folder: str | Path) -> str:
    """Identity of a base model: a SHA-256 that is quick on any size.

    Covers ``config.json`` and, of each weight file, its name, size, header (names, dtypes, shapes,
    offsets) and bytes. Up to 64 MiB of weights every byte counts. Beyond that, of each file the
    first and last 64 KiB of the data and 64 evenly spaced blocks of 64 KiB: another training run,
    another dtype or layout and a changed config are detected; an edit of a few numbers between the
    samples is not. It is a guard against mistakes, not against forgery.

    Raises:
        InputError: as :func:`open_tensors`.
    """
    files = sorted(weight_files(folder))
    config = Path(folder) / CONFIG_FILE
    total = hashlib.sha256(config.read_bytes() if config.is_file() else b"")
    whole = sum(file.stat().st_size for file in files) < _HASH_WHOLE_BYTES
    for file in files:
        total.update(f"\n{file.name} {file.stat().st_size}\n".encode())
        with _open_weights(file) as handle:  # a truncated file has no identity
            if isinstance(handle, TorchFile):
                total.update(handle.description)
            total.update(_file_digest(file, whole, isinstance(handle, TorchFile)))
    return total.hexdigest()


def _file_digest(file: Path, whole: bool, headless: bool) -> bytes:
    with file.open("rb") as stream:
        if whole:
            return hashlib.file_digest(stream, "sha256").digest()
        size = file.stat().st_size
        data = 0 if headless else 8 + int.from_bytes(stream.read(8), "little")
        stream.seek(0)
        digest = hashlib.sha256(stream.read(data))
        last = max(data, size - _SAMPLE_BYTES)
        for sample in range(_SAMPLES + 2):
            stream.seek(data + (last - data) * sample // (_SAMPLES + 1))
            digest.update(stream.read(_SAMPLE_BYTES))
        return digest.digest()


def shortened(names: Sequence[str]) -> str:
    """At most eight names in one line, and how many more there are."""
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f", … and {more} more" if more > 0 else "")
