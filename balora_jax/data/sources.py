"""Rows from local files or a hub data set.

Local files are read as they stand, each cell of its own type: no copy is cached, so an edited file
is never read stale, and no network is used. A hub data set goes through the usual cache of
`datasets`. Nothing here runs code that comes with a data set.
"""

import glob
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from balora_jax.data.csv_rows import csv_rows
from balora_jax.data.json_rows import json_rows
from balora_jax.data.rows import FileRows, Joined, Rows
from balora_jax.data.text_rows import TextRows
from balora_jax.errors import InputError
from balora_jax.paths import PACKAGE_PREFIX, resolve_path

_SUFFIXES = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "arrow",
    ".arrow": "arrow",
    ".feather": "arrow",
}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", re.ASCII)
_FORMATS = (
    "JSON lines (.jsonl, .json), CSV, TSV, parquet or Arrow (.arrow, .feather), the text ones also "
    "with .gz"
)


def load_rows(spec: str, *, split: str = "train", limit: int | None = None) -> Rows:
    """Load the rows of a local file, of several, of a saved data set, or of a hub data set.

    Args:
        spec: A path (``*``, ``?`` and ``**`` name several files, read in sorted order; a folder
            that ``save_to_disk`` of `datasets` wrote), ``balora_jax:`` and a path inside the
            package, or a hub name, with a configuration as ``name:config``. The kind of a file
            follows from its suffix.
        split: The split of a hub data set, as `datasets` writes it (``train``, ``test[:100]``), or
            of a folder that holds several. A local file is one split, whatever it is called.
        limit: Keep the first `limit` rows only.

    Returns:
        At least one row, each a mapping from column to cell. Cells of JSON are what `json` reads,
        those of CSV and TSV the text of the file (``007`` stays ``007``, ``None`` stays text),
        those of parquet and Arrow what `pyarrow` reads; an id of a `ClassLabel` is its name. Rows
        of files stay in the file: they are parsed again each time that they are asked for, and a
        file that changes in between is refused.

    Raises:
        InputError: No such file or data set, a file that cannot be read, or no row in it.
    """
    if limit is not None and limit < 1:
        raise InputError(f"{spec}: expected a limit of at least 1 row, got {limit}. Leave it out.")
    path = resolve_path(spec)
    if hub_set(spec) is None:
        rows: Rows = _joined(_matching_files(path, split), limit)
    else:
        # `datasets` makes folders and reads settings: nothing that a local file needs.
        from balora_jax.data.hub import hub_rows

        rows = hub_rows(path, split, limit)
    if len(rows) == 0:
        raise InputError(f"{spec}: expected at least one row, got an empty data set. Add rows.")
    return rows


def hub_set(spec: str) -> str | None:
    """The name of the hub data set that a source means, without its configuration.

    None for files.

    >>> hub_set("org/sums:main"), hub_set("runs/sums.jsonl"), hub_set("/data/*.csv")
    ('org/sums', None, None)
    """
    local = spec.startswith(PACKAGE_PREFIX) or _is_local(resolve_path(spec))
    return None if local else spec.partition(":")[0]


def _is_local(path: str) -> bool:
    rooted = path.startswith(("/", "./", "../", "~")) or "\\" in path
    known = _kind(path) is not None
    return rooted or known or Path(path).exists() or _HUB_NAME.fullmatch(path) is None


def _kind(path: str) -> str | None:
    """The reader for a file name, and None for a suffix that no reader knows."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    packed = suffixes[-1:] == [".gz"]
    kind = _SUFFIXES.get(suffixes[-2 if packed else -1]) if len(suffixes) > packed else None
    return None if packed and kind == "arrow" else kind


def _matching_files(path: str, split: str) -> list[str]:
    # A file whose very name holds "[" or "*" wins over reading that name as a pattern.
    exact = Path(path).exists()
    found = [path] if exact else sorted(glob.glob(path, recursive=True))
    if not found:
        raise InputError(f"{path}: expected a data file, found none. Check the path.")
    if exact and Path(path).is_dir() and (saved := _saved(path, split)) is not None:
        return saved
    for file in found:
        if Path(file).is_dir():
            raise InputError(f"{file}: expected a data file, got a folder. Name the files in it.")
        if not Path(file).is_file():
            raise InputError(
                f"{file}: expected a data file, got a pipe or a device, which can be read only "
                "once. Write its rows to a file."
            )
        if _kind(file) is None:
            raise InputError(f"{file}: expected {_FORMATS}, got another suffix. Convert the file.")
    if len({_kind(file) for file in found}) > 1:
        raise InputError(f"{path}: expected files of one kind, got several. Narrow the pattern.")
    return found


def _saved(folder: str, split: str) -> list[str] | None:
    from balora_jax.data.arrow_rows import files_of_folder

    return files_of_folder(folder, split)


def _joined(files: list[str], limit: int | None) -> Rows:
    """The rows of all files; a header or an array is part of each, so each is read alone."""
    parts: list[Any] = []
    for file in files:
        left = None if limit is None else limit - sum(map(len, parts))
        if left == 0:
            break
        parts.append(_READERS[str(_kind(file))](file, left))
        if parts[-1].columns != parts[0].columns:
            raise InputError(
                f"{file}: expected the columns of {files[0]}, got {', '.join(parts[-1].columns)}. "
                "Load files with different columns apart."
            )
    return parts[0] if len(parts) == 1 else Joined(parts)


def _arrow(file: str, limit: int | None) -> FileRows:
    from balora_jax.data.arrow_rows import ArrowRows  # `pyarrow` for those who need it

    return ArrowRows(file, limit)


_READERS: dict[str, Callable[[str, int | None], FileRows]] = {
    "json": lambda file, limit: TextRows(file, json_rows, limit),
    "csv": lambda file, limit: TextRows(file, csv_rows, limit),
    "arrow": _arrow,
}
