"""Write ``settings.md``, every key of a config, from the schema: ``python docs/settings.py``."""

import inspect
import re
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from balora_jax.config_schema import run_schema

SCHEMA = run_schema()
PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Settings

Every key of a config, with its type, default and meaning. This page is written by `python docs/settings.py` from the schema. `--set SECTION.KEY=VALUE` overrides one. An unknown key is refused with the nearest known one, and so is a setting that the task does not read, where it differs from its default.
"""  # noqa: E501


def page() -> str:
    """The whole page."""
    top = [f for f in SCHEMA.model_fields.items() if not _is_section(f[1])]
    sections = [f for f in SCHEMA.model_fields.items() if _is_section(f[1])]
    parts = [HEAD, _table(dict(top), explained(SCHEMA))]
    for name, field in sections:
        section: Any = field.annotation
        first = inspect.cleandoc(section.__doc__ or "").partition("\n\n")[0]
        parts.append(f"## {name}\n\n{_prose(first)}\n")
        parts.append(_table(section.model_fields, explained(section)))
    return "\n".join(parts)


def explained(section: type[BaseModel]) -> dict[str, str]:
    """What the docstring of a section says of each of its keys."""
    text = inspect.cleandoc(section.__doc__ or "").partition("Attributes:\n")[2]
    found = {}
    for entry in re.split(r"^ {4}(?=\w)", text, flags=re.MULTILINE)[1:]:
        names, _, says = entry.partition(":")
        for name in names.split(","):
            found[name.strip()] = _prose(says)
    return found


def _table(fields: dict[str, FieldInfo], says: dict[str, str]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        meaning = _prose(field.description or "") or says.get(name, "")
        rows.append(f"| `{name}` | {_type(field)} | {_default(field)} | {meaning} |")
    return "\n".join(rows) + "\n"


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _prose(text: str) -> str:
    return " ".join(text.split()).replace("``", "`").replace("|", "\\|")


def _type(field: FieldInfo) -> str:
    bounds = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = _name(field.annotation)
    for rule in field.metadata:
        found += "".join(
            f" {sign} {getattr(rule, key):g}" for key, sign in bounds.items() if hasattr(rule, key)
        )
    return found.replace("|", "\\|")


def _name(kind: Any) -> str:
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if origin is typing.Annotated:
        rules = [rule for rule in inside[1:] if isinstance(rule, FieldInfo)]
        return _type(rules[0].merge_field_infos(*rules, annotation=inside[0])) if rules else ""
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_name(part) for part in inside if part is not type(None))
    if origin is tuple:
        many = inside[-1] is Ellipsis
        return f"list of {_name(inside[0])}" if many else " and ".join(map(_name, inside))
    if origin is dict:
        return f"{_name(inside[0])} → {_name(inside[1])}"
    words = {str: "text", int: "integer", float: "number", bool: "true, false", dict: "mapping"}
    return words.get(kind, getattr(kind, "__name__", "any"))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, tuple | list):
        return f"`[{', '.join(map(str, value))}]`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return "–" if value in (None, "") else f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
