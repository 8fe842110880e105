"""The teacher's last hidden states of every counted position, computed once and kept on disk."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from balora_jax.array_types import Array
from balora_jax.data.examples import Example
from balora_jax.data.layout import Shape, laid_out
from balora_jax.errors import InputError
from balora_jax.io import lock, seals
from balora_jax.io.folders import drafts_of
from balora_jax.io.matrix_file import Matrix
from balora_jax.numerics.objective import MaskAlignment
from balora_jax.parallel import hosts, sharding
from balora_jax.parallel.axes import TOKENS
from balora_jax.progress import progress_bar
from balora_jax.tasks.text.loss import HIDDEN, READ
from balora_jax.tasks.text.program import TextProgram
from balora_jax.training.workdir import TEACHER_ROWS

Batch = dict[str, np.ndarray]

SHOW_PROGRESS_ABOVE = 500
_NOTHING = "it is not there"
_PARTS = 4  # lengths that rows are padded to: a quarter of the longest, a half, ...


@dataclass(frozen=True)
class Places:
    """Where the counted positions of the examples lie among the rows that are kept.

    Attributes:
        order: examples by length, int [examples]: the order in which they are computed and kept.
        first: number of each example's first token among all tokens, int [examples].
        row: kept row of each token, int [tokens]; -1 where it does not count.
        count: rows that are kept.
    """

    order: np.ndarray
    first: np.ndarray
    row: np.ndarray
    count: int

    @classmethod
    def of(cls, examples: Sequence[Example], alignment: MaskAlignment) -> "Places":
        """Those of examples, by ``regularizers.mask_alignment``."""
        masks = [counted(example.loss_mask, alignment) for example in examples]
        lengths = np.array([len(mask) for mask in masks])
        counts = np.array([np.count_nonzero(mask) for mask in masks])
        order = np.argsort(lengths, kind="stable")
        starts = np.empty_like(counts)
        starts[order] = np.cumsum(counts[order]) - counts[order]
        mask = np.concatenate(masks)
        within = np.cumsum(mask) - 1 - np.repeat(np.cumsum(counts) - counts, lengths)
        row = np.where(mask, np.repeat(starts, lengths) + within, -1)
        return cls(order, np.cumsum(lengths) - lengths, row, int(counts.sum()))

    def rows_of(self, examples: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Kept rows of places, -1 for none; ``positions`` count from 0 in each example."""
        token = self.first[np.maximum(examples, 0)] + positions
        return np.where(examples < 0, -1, self.row[token])


def counted(loss_mask: np.ndarray, alignment: MaskAlignment) -> np.ndarray:
    """Positions of an example that the regularizers count, bool [T].

    >>> counted(np.array([0, 0, 1, 1]), "shifted").tolist()
    [False, True, True, False]
    """
    marked = loss_mask > 0
    if alignment == "official":
        return marked
    return np.append(marked[1:], np.zeros(min(len(marked), 1), bool))


@dataclass(frozen=True)
class Kept:
    """The rows on disk, for the batches of a run.

    Attributes:
        places: which row is whose.
        rows: [rows, D], mapped.
    """

    places: Places
    rows: np.ndarray

    def added(self, batch: Batch) -> Batch:
        """A batch [micro-batches, B, T] with the hidden states of its counted positions."""
        rest = {name: value for name, value in batch.items() if name != "example_ids"}
        row = self.places.rows_of(batch["example_ids"], batch["positions"])
        hidden = np.zeros((*row.shape, self.rows.shape[1]), self.rows.dtype)
        hidden[row >= 0] = self.rows[row[row >= 0]]
        return rest | {HIDDEN: hidden}


@dataclass(frozen=True)
class TeacherRows:
    """What is kept of the teacher of a run, and how it is made.

    Attributes:
        program: the computation.
        examples: the training rows.
        digest: of the examples and their order.
        base: fingerprint of the checkpoint.
        length: tokens of the longest row.
        pad_id: the token for empty places.
    """

    program: TextProgram
    examples: Sequence[Example]
    digest: str
    base: str
    length: int
    pad_id: int

    def matrix(self, places: Places, own: Mapping[str, np.ndarray]) -> Matrix:
        """The rows on disk; ``own`` is what the teacher has beside the checkpoint, by path."""
        model = self.program.config.model
        about = [self.base, self.digest, self.program.objective.mask_alignment]
        about += [model.dtype, model.quantization]
        digest = hashlib.sha256(json.dumps(about).encode())
        for path in sorted(own):
            digest.update(path.encode() + np.ascontiguousarray(own[path]).tobytes())
        width = self.program.decoder.hidden_size
        return Matrix(digest.hexdigest(), places.count, width, model.dtype)

    def ready(self, parts: Sequence[Mapping[str, Array]], folder: Path, *, shared: bool) -> Kept:
        """The rows of all examples, from the file in a folder, or computed and written there.

        To be called by all processes; the first one writes.

        Args:
            parts: the arrays that the teacher is bound to; the first are the checkpoint's.
            folder: of the run, or one that runs share.
            shared: which.

        Raises:
            InputError: something else has the file's name.
            OSError: the disk is full, or the folder cannot be read and written.
        """
        places = Places.of(self.examples, self.program.objective.mask_alignment)
        own = {path: value for part in parts[1:] for path, value in part.items()}
        matrix = self.matrix(places, hosts.gathered_all(own))
        file = folder / file_name(matrix.key if shared else None)
        with ExitStack() as stack:

            def look() -> str | None:
                if shared:
                    stack.enter_context(lock.turn(file, lambda: _say_waiting(file)))
                return _fault(matrix, file)

            fault = hosts.by_first(look)
            if fault is not None:
                blocks = self.blocks(parts, places)
                if hosts.is_first():
                    matrix.write(file, blocks)
                else:
                    for _ in blocks:
                        pass
        hosts.barrier("teacher kept")
        hosts.together(lambda: _check_seen(file, matrix))
        _say(file, matrix, fault)
        return Kept(places, matrix.mapped(file))

    def blocks(self, parts: Sequence[Mapping[str, Array]], places: Places) -> Iterator[np.ndarray]:
        """Hidden states [n, D] of the counted positions, example by example as they are kept."""
        mesh, training = self.program.mesh, self.program.config.training
        size = training.batch_size // training.accumulation
        bind = self.program.taught.bind
        forward = jax.jit(lambda parts, *arrays: bind(*parts).hidden(*arrays))
        layout = NamedSharding(mesh, PartitionSpec(*sharding.batch_sharding(mesh).spec[1:]))
        quiet = len(self.examples) < SHOW_PROGRESS_ABOVE or not hosts.is_first()
        title, total = "teacher, once", len(self.examples)
        with progress_bar(total=total, desc=title, unit="row", disable=quiet) as bar:
            for start in range(0, total, size):
                some = [self.examples[i] for i in places.order[start : start + size]]
                batch, mask = self._padded(some, size)
                arrays = [hosts.place(array, layout) for array in (batch[name] for name in READ)]
                yield hosts.gathered(forward(tuple(parts), *arrays))[mask]
                bar.update(len(some))

    def _padded(self, examples: Sequence[Example], rows: int) -> tuple[Batch, np.ndarray]:
        """Arrays [B, T] of a few examples, and which of their places count."""
        longest = max(len(one.input_ids) for one in examples)
        shape = Shape(rows, row_length(longest, self.length, self._unit))
        numbers = [[number] for number in range(len(examples))]
        mask = np.zeros(shape, bool)
        for row, one in zip(mask, examples, strict=False):
            alignment = self.program.objective.mask_alignment
            row[: len(one.loss_mask)] = counted(one.loss_mask, alignment)
        return laid_out(examples, numbers, shape, self.pad_id, numbered=False), mask

    @property
    def _unit(self) -> int:
        return self.program.mesh.shape[TOKENS]


def row_length(longest: int, most: int, unit: int) -> int:
    """One of a few lengths for rows: a quarter of ``most``, a half, ..., in multiples of 8.

    >>> [row_length(n, 100, 1) for n in (3, 25, 33, 80, 100)]
    [32, 32, 56, 80, 100]
    """
    unit = np.lcm(unit, 8)
    for part in range(1, _PARTS):
        length = -(-most * part // _PARTS // unit) * unit
        if longest <= length <= most:
            return int(length)
    return most


def file_name(key: str | None) -> str:
    """Of the rows: in the folder of a run one name, in one that runs share by the key."""
    return TEACHER_ROWS if key is None else f"teacher_hidden_{key[:32]}.safetensors"


def check_room(program: TextProgram, examples: Sequence[Example], folder: Path, key: str) -> None:
    """See that the rows can be written to a folder, before the work; writes nothing.

    Args:
        program: the computation.
        examples: the training rows.
        folder: where; it need not be there.
        key: that names it, for the message.

    Raises:
        InputError: it cannot be written, or the disk has no room.
    """
    seals.check_outside(folder, key)
    matrix = planned(program, examples)
    try:
        if any(file.stat().st_size == matrix.file_bytes for file in folder.glob("teacher_hidden*")):
            return  # it may serve again
        there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        with tempfile.TemporaryFile(dir=there):
            free = shutil.disk_usage(there).free
    except OSError as error:
        raise InputError(
            f"{key}: expected a folder that can be written, got {folder}: "
            f"{error.strerror or error}. Choose another."
        ) from error
    if free < matrix.file_bytes:
        raise InputError(
            f"regularizers.teacher_cache: expected room for {said_size(matrix)} on the disk of "
            f"{folder}, got {in_words(free)}. Make room, name another folder in "
            "regularizers.teacher_cache_folder, or leave it out."
        )


def planned(program: TextProgram, examples: Sequence[Example]) -> Matrix:
    """The size of what is kept of the teacher; its key is not known yet."""
    alignment = program.objective.mask_alignment
    rows = sum(int(counted(one.loss_mask, alignment).sum()) for one in examples)
    return Matrix("0" * 64, rows, program.decoder.hidden_size, program.config.model.dtype)


def said_size(matrix: Matrix) -> str:
    """The size of a matrix for people.

    >>> said_size(Matrix("", 1000, 512, "bfloat16"))
    '1,000 positions x 512 x 2 bytes = 1.0 MB'
    """
    size = in_words(matrix.data_bytes)
    return f"{matrix.rows:,} positions x {matrix.width:,} x {matrix.item.itemsize} bytes = {size}"


def in_words(size: int) -> str:
    """Bytes for people.

    >>> in_words(2_500_000_000), in_words(700)
    ('2.5 GB', '0.7 kB')
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size / 1e3:,.1f} kB"


def _fault(matrix: Matrix, file: Path) -> str | None:
    """Why a file does not serve, in words; None where it does. What a killed writer left goes."""
    for draft in drafts_of(file.parent, [file.name]):
        draft.unlink()
    if not file.is_symlink() and file.is_file():
        return matrix.fault(file)
    if file.is_symlink() or file.exists():
        raise InputError(
            f"{file}: expected what is kept of a teacher, or nothing, got a link or no file. Move "
            "it elsewhere."
        )
    return _NOTHING


def _check_seen(file: Path, matrix: Matrix) -> None:
    if not file.is_file() or file.stat().st_size != matrix.file_bytes:
        raise InputError(
            f"{file}: expected a folder that all hosts share, got one that this host does not see. "
            "Name another in regularizers.teacher_cache_folder."
        )


def _say_waiting(file: Path) -> None:
    hosts.say(f"teacher: waiting for another run that writes {file}")


def _say(file: Path, matrix: Matrix, fault: str | None) -> None:
    if fault is None:
        hosts.say(f"teacher: {file} serves, no forward pass of the teacher is left")
        return
    size = in_words(matrix.file_bytes)
    again = "" if fault == _NOTHING else f", in place of one that does not serve: {fault}"
    hosts.say(f"teacher: wrote {file} ({size}){again}")
