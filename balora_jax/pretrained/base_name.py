"""The name by which other tools find a base: that of the hub where one is known."""

import re
from pathlib import Path
from typing import NamedTuple

from balora_jax.paths import PACKAGE_PREFIX, kind_of, resolve_path

# Of the hub's cache: models--ORG--NAME/snapshots/COMMIT. No name of the hub holds "--".
_REPOSITORY = re.compile(r"models--([\w.-]+)", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


class BaseName(NamedTuple):
    """What other tools are told of a base.

    Attributes:
        name: of the hub, or a folder.
        revision: of the hub; None for a folder.
        on_hub: whether it is a name of the hub.
    """

    name: str
    revision: str | None
    on_hub: bool

    @property
    def short(self) -> str:
        """The name without the folders above it, which are of one machine."""
        return self.name if self.on_hub else Path(self.name).name or self.name


def base_name(folder: Path, name_or_path: str, revision: str | None) -> BaseName:
    """The name of a base, and its commit where no revision is given and the cache says it.

    A folder of the hub's cache gets the name of its repository; any other stays as it is written,
    but of one inside this package, which nobody else knows, the place is given.

    Args:
        folder: where its files lie.
        name_or_path: as in ``model.name_or_path``.
        revision: as in ``model.revision``.

    >>> at = Path("/hub/models--org--m/snapshots/" + 40 * "a")
    >>> base_name(at, "org/m", None).revision == 40 * "a", base_name(at, "org/m", "v1").revision
    (True, 'v1')
    >>> base_name(Path("/"), "/", None)
    BaseName(name='/', revision=None, on_hub=False)
    """
    if name_or_path.startswith(PACKAGE_PREFIX):
        return BaseName(str(folder), None, False)
    cached = _cached(folder)
    if kind_of(resolve_path(name_or_path)) == "folder":
        return BaseName(name_or_path, None, False) if cached is None else BaseName(*cached, True)
    return BaseName(name_or_path, revision or (cached[1] if cached else None), True)


def _cached(folder: Path) -> tuple[str, str] | None:
    """Repository and commit of a folder of the hub's cache; None for any other folder."""
    *_, repository, snapshots, commit = ("", "", "", *folder.expanduser().resolve().parts)
    found = _REPOSITORY.fullmatch(repository)
    if found is None or snapshots != "snapshots" or not _COMMIT.fullmatch(commit):
        return None
    return found[1].replace("--", "/"), commit
