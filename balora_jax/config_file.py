"""A YAML file read as a checked config, or refused in one sentence."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from balora_jax.config import RunConfig
from balora_jax.config_data import ONE_FILE, SEVERAL, TrainSet
from balora_jax.config_schema import run_schema
from balora_jax.errors import InputError
from balora_jax.extensions import load_extensions
from balora_jax.paths import kind_of
from balora_jax.tasks.settings import check_settings
from balora_jax.untyped.shown import one_line, shown
from balora_jax.untyped.yaml_text import parse_yaml, read_yaml


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML config and apply ``key.path=value`` overrides.

    Raises:
        InputError: a missing or malformed file, an unknown key (with a suggestion), a value of
            the wrong type or out of range; the message names the key.

    Example:
        >>> load_config("configs/absent.yaml")
        Traceback (most recent call last):
        balora_jax.errors.InputError: configs/absent.yaml: expected a config file, found none. ...
    """
    path = Path(path)
    if kind_of(path) is None:
        raise InputError(f"{path}: expected a config file, found none. Check the path.")
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise InputError(
            f"{path}: expected sections such as 'model:', got {shown(tree)}. Fill it in."
        )
    for override in overrides:
        _apply_override(tree, override)
    load_extensions(_texts(tree.get("extensions"), str(path)), path.parent)
    return parse_config(tree, str(path))


def _texts(value: Any, where: str) -> list[str]:
    """The files under ``extensions``, which are read before the schema can check them."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise InputError(
            f"{where}: extensions: expected a list of Python files, got {shown(value)}. Write "
            "extensions: [my_terms.py]."
        )
    return value


def parse_config(tree: Mapping[str, Any], where: str) -> RunConfig:
    """Validate a nested mapping; ``where`` opens every message."""
    try:
        config = run_schema().model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{where}: {_describe(error)}") from error
    try:
        check_settings(config)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return config


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML that ``load_config`` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def dump_changes(config: RunConfig) -> str:
    """Those of the settings as YAML that are not their defaults."""
    changed = config.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump(changed, sort_keys=False, allow_unicode=True)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set: expected key.path=value, got {shown(override)}. Write it so.")
    *parents, leaf = key.strip().split(".")
    where = f"--set {one_line(key, most=100)}: expected a YAML value"
    value = parse_yaml(text, where, "Quote it.", leaf)
    node = tree
    for parent in parents:
        below = node.setdefault(parent, {})
        if not isinstance(below, dict):
            raise InputError(f"--set {key}: {parent!r} is not a section. Check the key.")
        node = below
    node[leaf] = value


def _describe(error: ValidationError) -> str:
    """The first problem as one sentence; pydantic's own wording is not a user's."""
    first = error.errors()[0]
    location = ".".join(str(part) for part in first["loc"] if not _is_type_tag(part))
    kind, got = first["type"], first.get("input")
    if kind == "extra_forbidden":
        # The last part is the user's own word, whatever it looks like.
        *above, last = first["loc"]
        return _unknown_key([*(str(part) for part in above if not _is_type_tag(part)), str(last)])
    if kind == "missing":
        return f"{location}: expected a value, got none. Add the key."
    if kind == "value_error":
        said = str(first.get("ctx", {}).get("error", first["msg"]))
        return f"{location}: {said}" if said.startswith("expected ") else said
    if kind == "string_too_short":
        return f"{location}: expected a text, got an empty one. Write it."
    expected = first["msg"].removeprefix("Input should be ").rstrip(".")
    return f"{location}: expected {expected}, got {shown(got)}. Correct the value."


def _is_type_tag(part: Any) -> bool:
    """Pydantic adds the branch of a union ('str', 'tuple[str, ...]') to a location."""
    tags = ("str", "int", "float", ONE_FILE, SEVERAL)
    return isinstance(part, str) and (part in tags or "[" in part)


def _unknown_key(location: list[str]) -> str:
    section: type[BaseModel] = run_schema()
    for part in location[:-1]:
        kind = TrainSet if part.isdigit() else section.model_fields[part].annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):  # else a list of such
            section = kind
    known = list(section.model_fields)
    near = difflib.get_close_matches(location[-1], known, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"It knows {', '.join(known)}."
    where = ".".join(location[:-1]) or "the top level"
    return f"{'.'.join(location)}: unknown key in {where}. {hint}"
