"""Rows from local files or a hub data set.

Local files are read as they stand, JSON row by row and the rest by `datasets` as a stream: no copy
is cached, so an edited file is never read stale, and no network is used. A hub data set goes
through the usual cache of `datasets`. Nothing here runs code that comes with a data set.
"""

import contextlib
import csv
import glob
import gzip
import io
import itertools
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import datasets
from datasets.exceptions import DatasetsError
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

from balora_jax.data.json_rows import MOST_OF_A_ROW, json_rows
from balora_jax.errors import InputError
from balora_jax.paths import PACKAGE_PREFIX, resolve_path
from balora_jax.progress import is_live

Row = Mapping[str, Any]

_SUFFIXES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
# Not load_dataset("csv", …): that reports each local load to a counter on the network.
_READERS: dict[str, Callable[..., Any]] = {
    "csv": datasets.Dataset.from_csv,
    "parquet": datasets.Dataset.from_parquet,
}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", re.ASCII)
_FORMATS = "JSON lines (.jsonl, .json), CSV, TSV or parquet, the text ones also with .gz"


@runtime_checkable
class Rows(Protocol):
    """A list-like of rows: a list of dicts or a `datasets.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...

    def __iter__(self) -> Iterator[Any]: ...


def load_rows(spec: str, *, split: str = "train", limit: int | None = None) -> Rows:
    """Load the rows of a local file, of several, or of a hub data set.

    Args:
        spec: A path (``*``, ``?`` and ``**`` name several files, read in sorted order),
            ``balora_jax:`` and a path inside the package, or a hub name, with a configuration as
            ``name:config``. The kind of a file follows from its suffix.
        split: The split of a hub data set, as `datasets` writes it (``train``, ``test[:100]``).
            A local file is one split, whatever it is called.
        limit: Keep the first `limit` rows only.

    Returns:
        At least one row, each a mapping from column to cell. Cells of CSV and TSV are the text of
        the file (``007`` stays ``007``, ``None`` stays text); TSV knows no quoting, as in GLUE.

    Raises:
        InputError: No such file or data set, a file that cannot be read, or no row in it.
    """
    if limit is not None and limit < 1:
        raise InputError(f"{spec}: expected a limit of at least 1 row, got {limit}. Leave it out.")
    path = resolve_path(spec)
    if spec.startswith(PACKAGE_PREFIX) or _is_local(path):
        rows: Rows = _load_local(_matching_files(path), limit)
    else:
        rows = _load_hub(path, split, limit)
    if len(rows) == 0:
        raise InputError(f"{spec}: expected at least one row, got an empty data set. Add rows.")
    return rows


def _is_local(path: str) -> bool:
    rooted = path.startswith(("/", "./", "../", "~")) or "\\" in path
    known = _kind(path) is not None
    return rooted or known or Path(path).exists() or _HUB_NAME.fullmatch(path) is None


def _kind(path: str) -> str | None:
    """The reader for a file name, and None for a suffix that no reader knows."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes[-1:] == [".gz"] and suffixes[-2:] != [".parquet", ".gz"]:
        suffixes.pop()
    return _SUFFIXES.get(suffixes[-1]) if suffixes else None


def _matching_files(path: str) -> list[str]:
    # A file whose very name holds "[" or "*" wins over reading that name as a pattern.
    exact = Path(path).exists()
    found = [path] if exact else sorted(glob.glob(path, recursive=True))
    if not found:
        raise InputError(f"{path}: expected a data file, found none. Check the path.")
    for file in found:
        if not Path(file).is_file():
            raise InputError(f"{file}: expected a data file, got a folder. Name the files in it.")
        if _kind(file) is None:
            raise InputError(f"{file}: expected {_FORMATS}, got another suffix. Convert the file.")
    if len({_kind(file) for file in found}) > 1:
        raise InputError(f"{path}: expected files of one kind, got several. Narrow the pattern.")
    return found


def _load_local(files: list[str], limit: int | None) -> list[Row]:
    kind = _kind(files[0])
    rows: list[Row] = []
    # One file at a time, so that an error names the file.
    for file in files:
        left = None if limit is None else limit - len(rows)
        if left == 0:
            break
        try:
            # A header is part of every CSV file, an array may be the whole of a JSON file: each
            # reader sees one file.
            if kind == "json":
                with _opened(file) as content:
                    rows.extend(json_rows(file, content, left))
            else:
                options = _csv_options(file, files[0]) if kind == "csv" else {}
                rows.extend(_stream(str(kind), file, options, left))
        except (OSError, EOFError, zlib.error, ValueError, csv.Error, DatasetsError) as e:
            if isinstance(e, InputError):
                raise
            raise InputError(_unreadable(file, e)) from e
    return rows


def _stream(kind: str, file: str, options: dict[str, Any], limit: int | None) -> list[Row]:
    if Path(file).stat().st_size == 0:
        return []
    with _quiet_datasets():
        try:
            stream = _READERS[kind](glob.escape(file), streaming=True, **options)
        except StopIteration:  # how `datasets` meets a packed file with nothing in it
            return []
        return list(itertools.islice(stream, limit))


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Keep the log of `datasets` silent: what it would say is in the error that we raise."""
    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)


def _csv_options(file: str, first: str) -> dict[str, Any]:
    """Options that keep every cell as text, under the names in the header."""
    header, width = _csv_header(file)
    if header != _csv_header(first)[0]:
        raise InputError(
            f"{file}: expected the columns of {first}, got {', '.join(header)}. "
            "Load files with different columns apart."
        )
    if len(set(header)) < len(header):
        raise InputError(f"{file}: expected each column once, got {', '.join(header)}. Rename one.")
    if width > len(header):
        # pandas would take the first cells for row names and move the others to the left.
        raise InputError(
            f"{file}: expected {len(header)} cells in a row, as in the header, got {width} in the "
            "first. Name every column."
        )
    return {
        **_csv_dialect(file),
        "names": header,
        "header": 0,
        "keep_default_na": False,
        "features": datasets.Features({name: datasets.Value("string") for name in header}),
    }


def _csv_dialect(file: str) -> dict[str, Any]:
    if ".tsv" in [suffix.lower() for suffix in Path(file).suffixes]:
        return {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    return {"delimiter": ",", "quoting": csv.QUOTE_MINIMAL}


def _csv_header(file: str) -> tuple[list[str], int]:
    """The names in the header, and how many cells the first row has."""
    before = csv.field_size_limit(MOST_OF_A_ROW)
    try:
        with _opened(file) as content:
            lines = io.TextIOWrapper(content, encoding="utf-8-sig", newline="")
            records = csv.reader(lines, **_csv_dialect(file))
            return next(records, []), len(next(records, []))
    finally:
        csv.field_size_limit(before)


def _opened(file: str) -> Any:
    """The bytes of a file, unpacked."""
    return gzip.GzipFile(file) if file.lower().endswith(".gz") else Path(file).open("rb")


def _unreadable(file: str, error: Exception) -> str:
    """One sentence for a file that its reader refused."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, OSError | EOFError | zlib.error) and file.lower().endswith(".gz"):
        what = f"a whole gzip file, got a damaged one ({reason})"
        return f"{file}: expected {what}. Copy or pack the file again."
    return f"{file}: expected a readable data file, got an error ({reason}). Fix the file."


@contextlib.contextmanager
def _no_bars_in_logs() -> Iterator[None]:
    """Keep the bars of `datasets` out of what is not a terminal: they would be one endless line."""
    if is_live(sys.stderr) or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _load_hub(spec: str, split: str, limit: int | None) -> Rows:
    name, _, config = spec.partition(":")
    if name in _PACKAGED_DATASETS_MODULES:
        # It would read whatever lies in the working directory.
        raise InputError(
            f"{spec}: expected a data file or a hub data set, got the name of a file format. Name "
            "the file."
        )
    try:
        with _no_bars_in_logs():
            found = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{spec}: expected a data file or a hub data set with the split {split!r}, got neither "
            f"({reason}). Check the name, the split and the network."
        ) from error
    if not isinstance(found, datasets.Dataset):
        raise InputError(f"{spec}: expected one split, got {split!r}. Name a single split.")
    return found if limit is None else found.select(range(min(limit, len(found))))
