"""Named things of one kind: those of this package, and those that a user's own file adds."""

import difflib
from collections.abc import Iterator
from typing import ClassVar, Generic, Protocol, TypeVar, runtime_checkable

from balora_jax.errors import InputError


@runtime_checkable
class NamedByClass(Protocol):
    """Registered object whose class says its name."""

    name: ClassVar[str]


@runtime_checkable
class Named(Protocol):
    """Registered object that knows its own name."""

    @property
    def name(self) -> str:
        """The name that configs use."""
        ...


Item = TypeVar("Item", bound=Named | NamedByClass)


class Registry(Generic[Item]):
    """Things of one kind by name, in the order in which they were added.

    Args:
        kind: What they are, for messages, such as ``start``.
        where: The setting that names one, such as ``adapter.start``.

    Example:
        >>> from typing import NamedTuple
        >>> class Start(NamedTuple):
        ...     name: str
        >>> starts = Registry("start", "adapter.start")
        >>> starts.register(Start("lora")).name, list(starts)
        ('lora', ['lora'])
        >>> starts["lora "]
        Traceback (most recent call last):
        balora_jax.errors.InputError: adapter.start: expected a start, one of lora, got 'lora '. ...
    """

    def __init__(self, kind: str, where: str):
        self.kind, self.where = kind, where
        self._items: dict[str, Item] = {}

    def register(self, item: Item) -> Item:
        """Add a thing under its name, and return it.

        Raises:
            InputError: There is one of this name already.
        """
        if item.name in self._items:
            raise InputError(
                f"{self.where}: expected a new name for a {self.kind}, got {item.name!r}, which "
                "there is already. Choose another name."
            )
        self._items[item.name] = item
        return item

    def __getitem__(self, name: str) -> Item:
        """The thing of this name.

        Raises:
            InputError: There is none of this name; the message lists those there are.
        """
        if not self._items:
            raise InputError(
                f"{self.where}: expected a {self.kind}, got {name!r}, but there is none "
                "registered. Register one in a file under extensions."
            )
        if name not in self._items:
            near = difflib.get_close_matches(name, self._items, n=1)
            advice = f"Did you mean {near[0]!r}?" if near else "Choose one of them."
            raise InputError(
                f"{self.where}: expected a {self.kind}, one of {', '.join(self._items)}, got "
                f"{name!r}. {advice}"
            )
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        """Whether there is one of this name."""
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        """The names, in order."""
        return iter(self._items)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._items)

    def values(self) -> tuple[Item, ...]:
        """The things themselves, in order."""
        return tuple(self._items.values())
