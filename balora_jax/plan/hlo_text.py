"""The text of a compiled module: computations, instructions, shapes."""

import math
import re
from dataclasses import dataclass, field
from functools import cached_property

ITEM_BYTES = {"pred": 1, "token": 0, "opaque": 0, "tuple": 0}


@dataclass(frozen=True)
class Instruction:
    """One line of a module.

    Attributes:
        name: without ``%``.
        shape: as written, a tuple in parentheses.
        opcode: such as ``all-gather``.
        operands: names.
        rest: attributes behind the operands, as written.
        argument: text between the parentheses, for parameters and constants.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    argument: str

    def called(self, *attributes: str) -> list[str]:
        """Computations named by attributes such as ``body``."""
        names = "|".join(attributes)
        found = re.findall(rf"\b(?:{names})=(?:%([\w.\-]+)|\{{([^}}]*)\}})", self.rest)
        return [name for one, many in found for name in re.findall(r"[\w.\-]+", one or many)]


@dataclass
class Computation:
    """Instructions of one computation by name; the last one written is its result.

    Attributes:
        name: without ``%``.
        instructions: in the order of the text.
    """

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    @cached_property
    def parameters(self) -> dict[int, str]:
        """Name of each parameter by its number."""
        return {
            int(one.argument): one.name
            for one in self.instructions.values()
            if one.opcode == "parameter"
        }

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Who reads a value."""
        found: dict[str, list[Instruction]] = {}
        for one in self.instructions.values():
            for operand in set(one.operands):
                found.setdefault(operand, []).append(one)
        return found


def parse_module(text: str) -> tuple[dict[str, Computation], str]:
    """All computations by name, and the name of the one that runs first."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            current = computations.setdefault(head[2], Computation(head[2]))
            entry = head[2] if head[1] else entry
        elif current is not None and (one := parse_instruction(line)):
            current.instructions[one.name] = one
            if line.lstrip().startswith("ROOT"):
                current.root = one.name
    return computations, entry


def bytes_of(shape: str, *, far: bool = False) -> int:
    """Bytes of a shape as written, of all parts of a tuple.

    >>> bytes_of("(bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, s32[])"), bytes_of("s4[16]{0}")
    (68, 8)
    >>> bytes_of("(bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, s32[])", far=True)
    4

    Args:
        shape: text of the shape.
        far: leave out arrays with a memory space of their own, ``S(n)``.
    """
    total = 0.0
    for dtype, sizes, layout in re.findall(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", shape):
        if far and "S(" in layout:
            continue
        item = ITEM_BYTES.get(dtype)
        if item is None:
            digits = re.search(r"\d+", dtype)
            item = 0 if digits is None else int(digits[0]) / 8
        total += item * math.prod(int(size) for size in sizes.split(",") if size)
    return int(total)


def parse_instruction(line: str) -> Instruction | None:
    """An instruction as written; None for any other line."""
    found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if found is None:
        return None
    rest = line[found.end() :]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shape, call = rest[:end], rest[end:].lstrip()
    opcode, _, _ = call.partition("(")
    behind = call[len(opcode) :]
    close = _closing(behind)
    argument = behind[1:close]
    operands = tuple(re.findall(r"%([\w.\-]+)", argument))
    return Instruction(found[1], shape, opcode, operands, behind[close + 1 :], argument)


def _closing(text: str) -> int:
    """Where the parenthesis that opens a text closes."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


def parts_of(shape: str) -> list[str]:
    """The elements of a tuple's shape, each with its layout."""
    return re.findall(r"[a-z]\w*\[[\d,]*\](?:\{[^}]*\})?", shape)


def tuple_index(one: Instruction) -> int | None:
    """The part of a tuple that an instruction takes."""
    found = re.search(r"index=(\d+)", one.rest)
    return int(found[1]) if one.opcode == "get-tuple-element" and found else None


def constant_of(one: Instruction | None) -> int | None:
    """The whole number that an instruction is; None for anything else."""
    if one is None or one.opcode != "constant" or not re.fullmatch(r"-?\d+", one.argument):
        return None
    return int(one.argument)
