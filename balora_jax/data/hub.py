"""Rows of a hub data set, through `datasets` and its cache. No code of a data set is run."""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
from datasets.exceptions import DatasetsError
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

from balora_jax.data.rows import Row, Rows, class_name
from balora_jax.errors import InputError
from balora_jax.progress import is_live


def hub_rows(spec: str, split: str, limit: int | None) -> Rows:
    """The rows of one split.

    Args:
        spec: a name, or ``name:config``.
        split: as `datasets` writes it.
        limit: the first rows only.

    Raises:
        InputError: there is no such data set or split, or the network is not there.
    """
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
    if limit is not None:
        found = found.select(range(min(limit, len(found))))
    classes = {
        column: kind.names
        for column, kind in found.features.items()
        if isinstance(kind, datasets.ClassLabel)
    }
    return _WithNames(found, classes, spec) if classes else found


class _WithNames:
    """Rows of a data set whose ids of classes are their names."""

    def __init__(self, rows: Any, classes: Mapping[str, Sequence[str]], spec: str):
        self._rows, self._classes, self._spec = rows, classes, spec

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._named(self._rows[index], index)

    def __iter__(self) -> Iterator[Row]:
        return (self._named(row, index) for index, row in enumerate(self._rows))

    def _named(self, row: dict[str, Any], index: int) -> Row:
        for column, names in self._classes.items():
            where = f"{self._spec}: row {index + 1}: column {column!r}"
            row[column] = class_name(names, row[column], where)
        return row


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
