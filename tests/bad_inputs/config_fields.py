"""Every setting of the schema with every kind of value, and values that are bad for one of them."""

import datetime
import math
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from balora_jax.config_schema import run_schema
from balora_jax.tasks.text.settings import UNREAD
from tests.bad_inputs.case import Arguments, Case, Place
from tests.bad_inputs.values import KINDS, OF_YAML

CHOSEN = {
    int: ("neg", "zero", "1e9", "1e18", "1e30", "float", "nan", "str", "list", "dict", "null"),
    float: ("neg", "zero", "1e18", "1e30", "tiny", "nan", "inf", "str", "list", "dict", "null"),
    bool: ("int", "float", "str", "list", "null"),
    str: ("int", "empty", "long", "nul", "lines", "escape", "list", "dict", "date", "null"),
    tuple: ("int", "str", "long", "escape", "list", "deep-list", "dict", "bytes", "null"),
    dict: ("int", "str", "list", "dict", "null"),
    datetime.date: ("int", "zero", "float", "bool", "str", "list", "dict", "nan", "null"),
}
"""Kinds of values that say most about a setting of a type."""
ELSEWHERE = ("bool", "set", "float")
"""Kinds that a section gets in place of its keys, with some of those above."""


def cases() -> Iterator[Case]:
    """All of them."""
    values = KINDS | OF_YAML
    for section, name, hint, bounds in fields():
        for kind in CHOSEN[main_type(hint)]:
            key = f"{section}.{name}" if section else name
            wrong = surely_wrong(hint, bounds, values[kind]) and not is_name(name, values[kind])
            expect = "refuse" if wrong else "any"
            yield Case(f"cfg/{key}-{kind}", _set(section, name, values[kind]), expect)
    for section in sections():
        for kind in ("int", "str", "list", "escape", *ELSEWHERE):
            yield Case(f"cfg/{section}-{kind}", _top(section, values[kind]))
        unknown = "x" * 300 + "\x1b[2J\n"
        yield Case(f"cfg/{section}-unknown-key", _set(section, "no_such_key", 1))
        yield Case(f"cfg/{section}-unknown-key-ugly", _set(section, unknown, 1))
        yield Case(f"cfg/{section}-key-int", _set(section, 7, 1))
    yield from _special()


def is_name(setting: str, value: Any) -> bool:
    """Whether a value is a plain word where a column or a label is named: text, as it stands."""
    names = setting == "labels" or setting.endswith(("_column", "_columns"))
    return names and isinstance(value, bool | int | float | datetime.date)


def fields() -> Iterator[tuple[str, str, Any, list[Any]]]:
    """Section (empty at the top), name, type and bounds of every setting."""
    for name, field in run_schema().model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        for key, one in (inner or {}).items():
            yield name, key, one.annotation, list(one.metadata)
        if inner is None:
            yield "", name, field.annotation, list(field.metadata)


def sections() -> list[str]:
    """The names of the sections."""
    found = run_schema().model_fields.items()
    return [name for name, field in found if hasattr(field.annotation, "model_fields")]


def branches(hint: Any) -> list[Any]:
    """The types of a union, and of what is annotated."""
    if get_origin(hint) is Annotated:
        return branches(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return [one for part in get_args(hint) for one in branches(part)]
    return [hint]


def plain(branch: Any) -> Any:
    """``tuple[str, ...]`` as ``tuple``, a literal as the type of its words."""
    if get_origin(branch) is Literal:
        return type(get_args(branch)[0])
    return get_origin(branch) or branch


def main_type(hint: Any) -> type:
    """The first type of a setting that is not None."""
    return next(plain(one) for one in branches(hint) if one is not type(None))


def surely_wrong(hint: Any, bounds: list[Any], value: Any) -> bool:
    """Whether a value is of no type that the setting has, or out of its bounds.

    A text of digits, a whole float and a bool may stand for numbers; what is not sure is not told.
    """
    found = branches(hint)
    if value is None:
        return type(None) not in found
    kinds = {plain(one) for one in found}
    bounds = bounds + [part for one in _annotated(hint) for part in _parts(one)]
    if isinstance(value, float) and not math.isfinite(value):
        return True
    if isinstance(value, bool):
        return not kinds & {bool, int, float}
    if isinstance(value, int | float):
        if bool in kinds:
            return value not in (0, 1)
        whole = float(value).is_integer() if abs(value) < 1e300 else True
        fits = float in kinds or (int in kinds and whole)
        return not fits or any(_beyond(value, bound) for bound in bounds)
    if isinstance(value, str):
        words = [word for one in found if get_origin(one) is Literal for word in get_args(one)]
        if words:
            return value not in words
        return str not in kinds and value != "12" and not (bool in kinds and value in ("y", "n"))
    if isinstance(value, list):
        parts = [part for one in (*found, hint) for part in get_args(one)]
        inner = {plain(one) for part in parts for one in branches(part)}
        return tuple not in kinds or int not in inner or value != [16]
    return not (isinstance(value, dict) and dict in kinds)


def _annotated(hint: Any) -> list[Any]:
    parts = [hint] if get_origin(hint) is Annotated else []
    return parts + [one for part in get_args(hint) if part is not hint for one in _annotated(part)]


def _parts(hint: Any) -> list[Any]:
    return [part for one in get_args(hint)[1:] for part in getattr(one, "metadata", [one])]


def _beyond(value: float, bound: Any) -> bool:
    """Whether a number breaks one bound (``Gt`` and its kin, of ``annotated_types``)."""
    low, high = getattr(bound, "gt", None), getattr(bound, "lt", None)
    least, most = getattr(bound, "ge", None), getattr(bound, "le", None)
    return bool(
        (low is not None and value <= low)
        or (high is not None and value >= high)
        or (least is not None and value < least)
        or (most is not None and value > most)
    )


def _set(section: str, name: Any, value: Any):
    def make(place: Place) -> Arguments:
        of_labels = f"{section}.{name}" in UNREAD
        tree = place.labels_tree() if of_labels else place.text_tree()
        if section:
            tree.setdefault(section, {})[name] = value
        else:
            tree[name] = value
        if section == "study":
            tree[section] = {"variants": {"a": {}}, **tree[section]}
            return ["study", place.config(tree), "--workdir", place.workdir]
        return place.train(tree)

    return make


def _top(section: str, value: Any):
    return lambda place: place.train({**place.text_tree(), section: value})


def _pairs(**sections: Any):
    return lambda place: place.train(place.text_tree(**sections))


def _special() -> Iterator[Case]:
    """Values that a parser takes and whose meaning is bad; what found a fault once comes first."""
    model, data = "name_or_path", "train"
    many = "/".join("x" * 9 for _ in range(800))
    evil = "(([a-z_.0-9]+)+)+!"
    for name, sections in {
        "name-long-slash": {"model": {model: many}},
        "attention-cudnn-cpu": {"model": {"attention": "cudnn"}},
        "start-niter-huge": {"adapter": {"start": f"pissa_niter_{10**30}"}},
        "start-niter-1e9": {"adapter": {"start": "pissa_niter_1000000000"}},
        "start-niter-superscript": {"adapter": {"start": "pissa_niter_²"}},
        "start-niter-neg": {"adapter": {"start": "pissa_niter_-1"}},
        "data-long": {"data": {data: many}},
        "data-json-builder": {"data": {data: "json"}},
        "data-csv-builder": {"data": {data: "csv"}},
        "data-tilde": {"data": {data: "~nobody_of_this_name/rows.jsonl"}},
        "name-tilde": {"model": {model: "~nobody_of_this_name/model"}},
        "start-tilde": {"adapter": {"start": "~nobody_of_this_name/adapter"}},
        "data-nul": {"data": {data: "a\0.jsonl"}},
        "data-device": {"data": {data: "/dev/zero"}},
        "data-proc": {"data": {data: "/proc/self/mem"}},
        "data-glob-all": {"data": {data: "**/[[]"}},
        "data-scheme": {"data": {data: "s3://bucket/rows.jsonl"}},
        "name-url": {"model": {model: "https://localhost/model"}},
        "name-package-up": {"model": {model: "balora_jax:../secret"}},
        "name-package-root": {"model": {model: "balora_jax:/etc"}},
        "revision-of-a-folder": {"model": {"revision": "main"}},
        "pattern-open": {"adapter": {"target_modules": "(q_proj"}},
        "pattern-none": {"adapter": {"target_modules": "[^a-z]"}},
        "remat-offload-cpu": {"model": {"remat": "offload"}},
        "template-attribute": {"data": {"template": "{question.__class__}="}},
        "template-index": {"data": {"template": "{question[0]}="}},
        "template-format": {"data": {"template": "{question!r:>9999999999}="}},
        "template-open": {"data": {"template": "{question"}},
        "template-answer": {"data": {"template": "{question}{answer}"}},
        "extensions-missing": {"extensions": ["gone.py"]},
        "extensions-text": {"extensions": "gone.py"},
        "extensions-up": {"extensions": ["../../../etc/passwd"]},
        "trackers-unknown": {"training": {"trackers": ["x"]}},
        "epochs-and-steps": {"training": {"epochs": 1.0}},
        "profile-swapped": {"training": {"profile_steps": [3, 1]}},
        "accumulation-no-divisor": {"training": {"accumulation": 3}},
        "mesh-two-rest": {"mesh": {"data": -1, "fsdp": -1}},
        "pair-eval-marker-empty": {"eval": {"task": "gsm8k", "marker": ""}},
        "pair-full-and-start": {"adapter": {"method": "full", "start": "/etc"}},
        "pair-dropout-pissa": {"adapter": {"start": "pissa", "dropout": 0.5}},
        "pair-labels-with-text": {"task": "labels"},
        "pair-adaptive-swapped": {
            "regularizers": {
                "consistency_schedule": "adaptive", "adaptive_min": 2.0, "adaptive_max": 1.0,
            }
        },
    }.items():  # fmt: skip
        unsure = name in ("name-tilde", "start-tilde", "template-format", "template-attribute")
        yield Case(f"cfg/{name}", _pairs(**sections), "any" if unsure else "refuse")
    yield Case("cfg/target-redos", _pairs(adapter={"target_modules": evil}), apart=True)
    # One that ends in time and fits no layer leaves none out.
    yield Case("cfg/exclude-redos", _pairs(adapter={"exclude_modules": evil}), "any", apart=True)
    for key in ("rank_pattern", "alpha_pattern"):
        make = _pairs(adapter={key: {evil: 1}})
        yield Case(f"cfg/{key.replace('_pattern', 'pat')}-redos", make, apart=True)
    yield Case("cfg/extension-exits", _extension("raise SystemExit(0)"))
    yield Case("cfg/extension-deep", _extension("def f(): return f()\nf()"))
    yield Case("cfg/extension-syntax", _extension("def"))
    yield Case("cfg/extension-bytes", _extension("\0"))
    for name, value in {
        "tag-int-bad": "!!int x",
        "tag-bool-bad": "!!bool x",
        "tag-float-bad": "!!float x",
        "tag-timestamp-bad": "!!timestamp x",
        "tag-binary-bad": "!!binary '*'",
        "tag-python": "!!python/object/apply:os.system [ls]",
        "tag-own": "!Thing {}",
        "deep-yaml": "[" * 3000 + "]" * 3000,
        "merge-scalar": "{<<: 3}",
        "digits": "9" * 5000,
        "sexagesimal": ":".join(["59"] * 4000),
    }.items():
        yield Case(f"cfg/{name}", _raw_value(value))


def _extension(code: str):
    def make(place: Place) -> Arguments:
        (place.folder / "mine.py").write_text(code)
        return place.train(place.text_tree(extensions=["mine.py"]))

    return make


def _raw_value(text: str):
    def make(place: Place) -> Arguments:
        tree = place.text_tree(adapter={"alpha": "HERE"})
        return place.train(place.config(tree).read_text().replace("HERE", text))

    return make
