"""YAML of users as values: every fault of a text is refused in one sentence, with its line."""

from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.events import AliasEvent
from yaml.nodes import CollectionNode, MappingNode, Node, ScalarNode, SequenceNode

from balora_jax.errors import InputError
from balora_jax.untyped.shown import one_line, shown

MOST_BYTES = 2**20
MOST_VALUES = 20_000
DEEPEST = 50

_TEXT = "tag:yaml.org,2002:str"
_NUMBERS = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}
_NO_TEXT = {f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "timestamp")}


def read_yaml(file: Path) -> Any:
    """The values of a YAML file.

    Raises:
        InputError: the file cannot be read or has more than a MiB; or as :func:`parse_yaml`.
    """
    try:
        if not file.is_file():  # a pipe or a device would never end
            raise InputError(f"{file}: expected a file, got something else. Check the path.")
        with file.open("rb") as stream:
            data = stream.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise InputError(
                f"{file}: expected at most {MOST_BYTES >> 10} KiB of YAML, got more. Check that "
                "it is the right file."
            )
        text = data.decode("utf-8")
    except OSError as error:
        raise InputError(
            f"{file}: expected a readable file, got {error.strerror}. Check the path."
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: expected YAML, got: {error}. Correct the file.") from error
    return parse_yaml(text, f"{file}: expected YAML", "Correct the file.")


def parse_yaml(text: str, expected: str, remedy: str, key: str = "") -> Any:
    """The values of a text, as YAML's safe loader makes them.

    Under ``labels`` and under keys that end with ``_column`` or ``_columns`` stand names, which are
    text as it was written: ``[no, yes]`` are no truth values there, and ``01`` is no number.

    Args:
        text: one document.
        expected: opens the message: where the text stands, and what belongs there.
        remedy: ends it.
        key: the key that the whole of it stands under, if there is one.

    Raises:
        InputError: no YAML, a key that stands twice in a section, a tag or a scalar that has no
            value, more than 50 levels, or aliases that stand for more than 20 000 values.

    >>> parse_yaml("{a: [1, x]}", "--set a: expected a YAML value", "Quote it.")
    {'a': [1, 'x']}
    >>> parse_yaml("{labels: [no, yes, 01], packing: yes}", "", "")
    {'labels': ['no', 'yes', '01'], 'packing': True}
    """
    try:
        loader = _Loader(text)
        loader.extents = {}
        node = loader.get_single_node()
        if node is None:
            return None
        if _holds_names(key):
            _read_as_text(node)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        reason = one_line(_reason(error), most=200)
        raise InputError(f"{expected}, got: {reason}. {remedy}") from error


def _reason(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    mark = error.problem_mark or error.context_mark
    said = ", ".join(part for part in (error.context, error.problem) if part)
    return said + (f" in line {mark.line + 1}" if mark else "")


class _Loader(yaml.SafeLoader):
    """The safe loader, with bounds, and without exceptions of other types than its own."""

    level = nodes = 0
    # Of every node that is complete: how many values it stands for, and how many levels.
    extents: dict[Node, tuple[int, int]]

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """One node and what is below it."""
        event = self.peek_event()
        self.level += 1
        self.nodes += 1
        if self.level > DEEPEST or self.nodes > MOST_VALUES:
            raise _too_much(event.start_mark)
        node = super().compose_node(parent, index)
        self.level -= 1
        if node is not None and not isinstance(event, AliasEvent):
            self.extents[node] = self._extent(node)
        elif node not in self.extents:  # it is still being composed
            raise _fault("an alias of what it stands in", event.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        """A section, whose keys differ."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, ScalarNode) else key
            if name in seen:
                raise _fault(f"the key {shown(key.value)} twice", key.start_mark)
            seen.add(name)
        for key, value in node.value:
            if _holds_names(key.value):
                _read_as_text(value)
        return node

    def construct_object(self, node: Node, *args: Any, **options: Any) -> Any:
        """The value of a node."""
        if isinstance(node, ScalarNode) and node.tag in _NUMBERS and ":" in node.value:
            # 1:30 is 90 in YAML 1.1 and text in 1.2; of a long one the value takes minutes.
            raise _fault(f"a number in base 60, {shown(node.value)}: quote it", node.start_mark)
        try:
            value = super().construct_object(node, *args, **options)
            if isinstance(value, str):
                value.encode()  # "\ud800" is half of a character, which no file can hold
            return value
        # What Python says of `!!int x`, `!!bool x`, `!!timestamp x`, 2024-13-45, 5000 digits ...
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
            kind = shown(node.tag.rpartition(":")[2])
            value = shown(node.value) if isinstance(node, ScalarNode) else "a section or list"
            raise _fault(f"{value} where {kind} was expected", node.start_mark) from error

    def _extent(self, node: Node) -> tuple[int, int]:
        inner = node.value if isinstance(node, CollectionNode) else ()
        if isinstance(node, MappingNode):
            inner = [part for pair in node.value for part in pair]
        found = [self.extents[part] for part in inner]
        values = 1 + sum(count for count, _ in found)
        levels = 1 + max((depth for _, depth in found), default=0)
        if values > MOST_VALUES or levels > DEEPEST:
            raise _too_much(node.start_mark)
        return values, levels


def _holds_names(key: Any) -> bool:
    return isinstance(key, str) and (key == "labels" or key.endswith(("_column", "_columns")))


def _read_as_text(node: Node) -> None:
    """Take a plain word, or those of a list, as text, whatever else it might be."""
    for one in node.value if isinstance(node, SequenceNode) else [node]:
        if isinstance(one, ScalarNode) and one.style is None and one.tag in _NO_TEXT:
            one.tag = _TEXT


def _fault(problem: str, mark: yaml.Mark) -> ConstructorError:
    return ConstructorError(None, None, problem, mark)


def _too_much(mark: yaml.Mark) -> ConstructorError:
    return _fault(
        f"more than {DEEPEST} levels or {MOST_VALUES} values, an alias counted as what it stands "
        "for",
        mark,
    )
