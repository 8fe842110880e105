"""Torch's pickles of tensors, read as data: no object of the file is made and nothing is called.

A pickle is a program for a stack machine. This one knows the instructions by which torch writes a
dict of tensors, and builds dicts, lists, tuples, texts and numbers, and in place of tensors and
their storages a description of each. Any other instruction, and any name but those few that torch
writes, ends the reading.
"""

import math
import pickletools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

MOST_BYTES = 16 * 2**20
"""Of a pickle: a checkpoint of ten thousand tensors has three million."""

_MOST_STEPS = 2_000_000
_MOST_DIMENSIONS = 8
_MOST = 2**62
_LONGEST_NAME = 1000

_STORAGES = {
    "torch DoubleStorage": "F64",
    "torch FloatStorage": "F32",
    "torch HalfStorage": "F16",
    "torch BFloat16Storage": "BF16",
    "torch LongStorage": "I64",
    "torch IntStorage": "I32",
    "torch ShortStorage": "I16",
    "torch CharStorage": "I8",
    "torch ByteStorage": "U8",
    "torch BoolStorage": "BOOL",
}


class UnfitError(ValueError):
    """What a pickle of tensors may not hold, as the end of a sentence: ``got …``."""


@dataclass(frozen=True)
class Storage:
    """Numbers that lie in a file one after another.

    Attributes:
        key: names them in the file.
        dtype: as safetensors writes it, such as ``BF16``.
        count: of the numbers.
    """

    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class TensorView:
    """A tensor: some numbers of a storage; offset and strides count numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_tensors(stream: BytesIO) -> dict[str, TensorView]:
    """The tensors by name of one pickle; the stream then stands behind it.

    Raises:
        UnfitError: an instruction or a name that no dict of tensors needs; a value that is no
            tensor; a tensor outside its storage, or whose numbers overlap.
    """
    found = read_value(stream)
    if type(found) is not dict:
        raise UnfitError(f"{_kind(found)} in place of a dict of tensors")
    found.pop("_metadata", None)
    for name, value in found.items():
        if len(name) > _LONGEST_NAME or not name.isprintable():
            raise UnfitError("a name of more than 1000 characters, or with unprintable ones")
        if type(value) is not TensorView:
            raise UnfitError(f"{_kind(value)} under the name {name[:100]}, not a tensor")
    return found


def read_value(stream: BytesIO) -> Any:
    """The value of one pickle, from where the stream stands.

    Raises:
        UnfitError: as :func:`read_tensors`, or no pickle.
    """
    machine = _Machine()
    try:
        with warnings.catch_warnings():
            # Of texts with escapes, in instructions that are not used here.
            warnings.simplefilter("ignore", DeprecationWarning)
            for step, (instruction, argument, _) in enumerate(pickletools.genops(stream)):
                _act(machine, step, instruction.name, argument)
    except UnfitError:
        raise
    except ValueError as error:  # of pickletools: no pickle, or one that ends too early
        raise UnfitError("a pickle that is broken") from error
    return machine.result


def _act(machine: "_Machine", step: int, name: str, argument: Any) -> None:
    if step == _MOST_STEPS:
        raise UnfitError(f"a pickle of more than {_MOST_STEPS} instructions")
    if name not in _INSTRUCTIONS:
        raise UnfitError(f"the pickle instruction {name}")
    _INSTRUCTIONS[name](machine, argument)


@dataclass
class _Machine:
    """The stack, the heights of its marks, and what was kept by number."""

    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    result: Any = None

    def pop(self) -> Any:
        """Take the top; never from below a mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise UnfitError("a pickle that takes from an empty stack")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        """Take all above the last mark, and the mark."""
        if not self.marks:
            raise UnfitError("a pickle that misses a mark")
        height = self.marks.pop()
        taken = self.stack[height:]
        del self.stack[height:]
        return taken

    def top(self, kind: type) -> Any:
        """The top, which stays, and must be of a kind."""
        value = self.pop()
        if type(value) is not kind:
            raise UnfitError(f"a pickle that fills {_kind(value)} as a {kind.__name__}")
        self.stack.append(value)
        return value


@dataclass(frozen=True)
class _Builder:
    """What a name of torch stands for: from the arguments that follow it to our description."""

    make: Callable[[tuple[Any, ...]], Any]


@dataclass(frozen=True)
class _Kind:
    """The name of a storage's class."""

    dtype: str


def _named(machine: _Machine, name: str) -> None:
    """Push what a name stands for, ``module name``."""
    if name in _STORAGES:
        machine.stack.append(_Kind(_STORAGES[name]))
    elif name in _BUILDERS:
        machine.stack.append(_Builder(_BUILDERS[name]))
    else:
        raise UnfitError(f"the name {name[:100].replace(' ', '.')}")


def _stack_named(machine: _Machine) -> None:
    name, module = machine.pop(), machine.pop()
    if type(name) is not str or type(module) is not str:
        raise UnfitError("a pickle whose names are no text")
    _named(machine, f"{module} {name}")


def _reduce(machine: _Machine) -> None:
    """Describe what torch would make here."""
    arguments, builder = machine.pop(), machine.pop()
    if type(builder) is not _Builder or type(arguments) is not tuple:
        raise UnfitError(f"a pickle that calls {_kind(builder)}")
    machine.stack.append(builder.make(arguments))


def _build(machine: _Machine) -> None:
    """Drop the attribute that modules give their dict: versions of their layouts."""
    state = machine.pop()
    machine.top(dict)
    if type(state) is not dict or set(state) - {"_metadata"}:
        raise UnfitError("a pickle that sets attributes")


def _storage(machine: _Machine) -> None:
    """Describe a storage: its words are the same in torch's two formats, one has one more."""
    found = machine.pop()
    fits = type(found) is tuple and len(found) in (5, 6) and found[0] == "storage"
    if not fits or found[5:] not in ((), (None,)):
        raise UnfitError("a reference to something other than a storage")
    _, kind, key, _, count = found[:5]
    if type(kind) is not _Kind or type(key) is not str or not _is_size(count):
        raise UnfitError("a storage whose description is broken")
    machine.stack.append(Storage(key, kind.dtype, count))


def _tensor(arguments: tuple[Any, ...]) -> TensorView:
    """Describe a tensor; what follows its strides says how it trains."""
    if len(arguments) not in (6, 7) or any(arguments[6:]):
        raise UnfitError("a tensor whose description is broken")
    storage, offset, shape, strides = arguments[:4]
    fits = type(storage) is Storage and type(shape) is type(strides) is tuple
    if not fits or len(shape) != len(strides) or len(shape) > _MOST_DIMENSIONS:
        raise UnfitError("a tensor whose description is broken")
    if not all(map(_is_size, (offset, *shape, *strides))):
        raise UnfitError("a tensor with an offset, a size or a stride that is no count")
    steps = tuple(by if count > 1 else 0 for by, count in zip(strides, shape, strict=True))
    view = TensorView(storage, offset, shape, steps)
    _check_inside(view)
    return view


def _check_inside(view: TensorView) -> None:
    """Raises UnfitError for numbers outside of the storage, or that serve twice."""
    steps = sorted((by, n) for by, n in zip(view.strides, view.shape, strict=True) if n > 1)
    reach = 1
    for by, size in steps:
        if by < reach and math.prod(view.shape):
            raise UnfitError("a tensor whose numbers overlap")
        reach += by * (size - 1)
    reach = reach if math.prod(view.shape) else 0
    if view.offset + reach > view.storage.count:
        raise UnfitError(f"a tensor that reaches {view.offset + reach} of {view.storage.count}")


def _parameter(arguments: tuple[Any, ...]) -> TensorView:
    if len(arguments) != 3 or type(arguments[0]) is not TensorView:
        raise UnfitError("a parameter that is no tensor")
    return arguments[0]


def _ordered(arguments: tuple[Any, ...]) -> dict[str, Any]:
    if arguments:
        raise UnfitError("an OrderedDict with arguments")
    return {}


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _kind(value: Any) -> str:
    """What a value is, never how it is written: it may hold itself."""
    names = {TensorView: "a tensor", Storage: "a storage", _Builder: "a name", _Kind: "a name"}
    return names.get(type(value), f"a value of type {type(value).__name__}")


def _set_items(found: dict[str, Any], items: list[Any]) -> None:
    if len(items) % 2:
        raise UnfitError("a pickle with a key that has no value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) is not str:  # the hash of a nested tuple may take forever
            raise UnfitError(f"{_kind(key)} as a key")
        found[key] = value


def _fill_dict(machine: _Machine, items: list[Any]) -> None:
    _set_items(machine.top(dict), items)


def _keep(machine: _Machine, number: int) -> None:
    value = machine.pop()
    machine.stack.append(value)
    machine.memo[number] = value


def _kept(machine: _Machine, number: int) -> None:
    if number not in machine.memo:
        raise UnfitError("a pickle that asks for what it did not keep")
    machine.stack.append(machine.memo[number])


def _end(machine: _Machine) -> None:
    machine.result = machine.pop()
    if machine.stack or machine.marks:
        raise UnfitError("a pickle that leaves something over")


def _push_tuple(machine: _Machine, size: int) -> None:
    machine.stack.append(tuple([machine.pop() for _ in range(size)][::-1]))


def _push_dict(machine: _Machine, items: list[Any]) -> None:
    machine.stack.append({})
    _fill_dict(machine, items)


_BUILDERS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
    "collections OrderedDict": _ordered,
}

_LITERALS = (
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINSTRING", "SHORT_BINSTRING"),
)

_INSTRUCTIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    **{name: lambda m, value: m.stack.append(value) for name in _LITERALS},
    "PROTO": lambda m, _: None,
    "FRAME": lambda m, _: None,
    "NONE": lambda m, _: m.stack.append(None),
    "NEWTRUE": lambda m, _: m.stack.append(True),
    "NEWFALSE": lambda m, _: m.stack.append(False),
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "EMPTY_DICT": lambda m, _: m.stack.append({}),
    "EMPTY_LIST": lambda m, _: m.stack.append([]),
    "EMPTY_TUPLE": lambda m, _: m.stack.append(()),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.pop_to_mark())),
    "TUPLE1": lambda m, _: _push_tuple(m, 1),
    "TUPLE2": lambda m, _: _push_tuple(m, 2),
    "TUPLE3": lambda m, _: _push_tuple(m, 3),
    "LIST": lambda m, _: m.stack.append(m.pop_to_mark()),
    "DICT": lambda m, _: _push_dict(m, m.pop_to_mark()),
    "APPEND": lambda m, _: (item := m.pop(), m.top(list).append(item)),
    "APPENDS": lambda m, _: (items := m.pop_to_mark(), m.top(list).extend(items)),
    "SETITEM": lambda m, _: _fill_dict(m, [m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m, _: _fill_dict(m, m.pop_to_mark()),
    "BINPUT": _keep,
    "LONG_BINPUT": _keep,
    "MEMOIZE": lambda m, _: _keep(m, len(m.memo)),
    "BINGET": _kept,
    "LONG_BINGET": _kept,
    "GLOBAL": _named,
    "STACK_GLOBAL": lambda m, _: _stack_named(m),
    "BINPERSID": lambda m, _: _storage(m),
    "REDUCE": lambda m, _: _reduce(m),
    "BUILD": lambda m, _: _build(m),
    "STOP": lambda m, _: _end(m),
}
