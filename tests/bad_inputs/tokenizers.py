"""The files of a tokenizer, its chat templates, and ``generation_config.json``."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.bad_inputs.case import Arguments, Case, Place
from tests.bad_inputs.values import KINDS, deep

CORE, SETTINGS, SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
STOPS = "generation_config.json"


def cases() -> Iterator[Case]:
    """All of them."""
    for name, change in CORES.items():
        expect = "any" if name in UNSURE_CORES else "refuse"
        yield Case(f"tk/{name}", _edited(CORE, change), expect, apart=name in CAN_END)
    for key, kinds in KEYS.items():
        for kind in kinds:
            keys = {key: KINDS[kind]}
            yield Case(
                f"tk/{key}-{kind}", _edited(SETTINGS, lambda found, k=keys: found | k), "any"
            )
    for name, (file, content, expect) in FILES.items():
        yield Case(f"tk/{name}", _file(file, content), expect)
    for name, content in {
        "no-json": "{", "empty": "", "list": "[]", "nul": "\0", "deep": deep("[", "]", 100_000),
    }.items():  # fmt: skip
        for stem, file in {"core": CORE, "settings": SETTINGS}.items():
            yield Case(f"tk/{stem}-{name}", _file(file, content), "any")
        yield Case(f"tk/special-{name}", _file(SPECIAL, content), "any")
        yield Case(f"tk/stops-{name}", _file(STOPS, content))
    yield from _stops()
    yield from _found()
    for name, template in CHATS.items():
        yield Case(f"chat/{name}", _chat(template), apart=name in CHATS_APART)
    for name, template in UNSURE_CHATS.items():
        yield Case(f"chat/{name}", _chat(template), "any", apart=name in CHATS_APART)
    for kind in ("int", "list", "dict", "bool", "float", "empty", "str", "long", "nul", "escape"):
        yield Case(f"chat/kind-{kind}", _chat(KINDS[kind]), "any")
    yield Case("chat/none", _chat(None))
    yield Case("chat/messages-missing", _chat("{{ messages }}", messages_column="gone"))


def _put(*path: Any, value: Any) -> Callable[[Any], None]:
    def change(core: Any) -> None:
        for part in path[:-1]:
            core = core[part]
        core[path[-1]] = value

    return change


CAN_END = (
    "regex-redos", "vocab-2e32", "post-bad", "pre-deep", "normalizer-deep", "normalizer-cycle",
    "added-many", "vocab-huge-word",
)  # fmt: skip
UNSURE_CORES = (
    *("version-other", "truncation-one", "padding-odd", "truncation-zero", "added-content-empty"),
    *("decoder-bad", "added-many", "vocab-huge-word", "pre-none", "normalizer-deep", "added-no-id"),
    *("regex-redos", "normalizer-regex", "post-none", "unk-missing"),
)
CORES: dict[str, Callable[[Any], Any]] = {
    "list": lambda core: [],
    "wrong-model": _put("model", value={"type": "Nope"}),
    "model-int": _put("model", value=7),
    "model-none": lambda core: core.pop("model") and None,
    "vocab-neg": _put("model", "vocab", "0", value=-1),
    "vocab-big": _put("model", "vocab", "0", value=2**31),
    "vocab-1e6": _put("model", "vocab", "0", value=10**6),
    "vocab-2e32": _put("model", "vocab", "0", value=2**32 - 1),
    "vocab-2e64": _put("model", "vocab", "0", value=2**64),
    "vocab-str": _put("model", "vocab", "0", value="x"),
    "vocab-float": _put("model", "vocab", "0", value=1.5),
    "vocab-list": _put("model", "vocab", value=[["0", 1]]),
    "vocab-empty": _put("model", "vocab", value={}),
    "vocab-huge-word": lambda core: core["model"]["vocab"].update({"w" * 10**6: 47}),
    "unk-missing": _put("model", "unk_token", value="<gone>"),
    "unk-int": _put("model", "unk_token", value=7),
    "regex-bad": _put("pre_tokenizer", "pattern", value={"Regex": "("}),
    "regex-redos": _put("pre_tokenizer", "pattern", value={"Regex": "(([0-9+]+)+)+!"}),
    "pre-bad": _put("pre_tokenizer", value={"type": "Nope"}),
    "pre-int": _put("pre_tokenizer", value=7),
    "pre-none": _put("pre_tokenizer", value=None),
    "pre-deep": lambda core: _put("pre_tokenizer", value=_sequence("pretokenizers", 300))(core),
    "normalizer-bad": _put("normalizer", value={"type": "Nope"}),
    "normalizer-regex": _put(
        "normalizer", value={"type": "Replace", "pattern": {"Regex": "("}, "content": ""}
    ),
    "normalizer-deep": lambda core: _put("normalizer", value=_sequence("normalizers", 100))(core),
    "post-bad": _put(
        "post_processor",
        value={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<gone>", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        },
    ),
    "post-type": _put("post_processor", "single", value=7),
    "post-none": _put("post_processor", value=None),
    "post-ids-neg": _put("post_processor", "special_tokens", "<s>", "ids", value=[-1]),
    "post-ids-big": _put("post_processor", "special_tokens", "<s>", "ids", value=[2**31]),
    "decoder-bad": _put("decoder", value={"type": "Nope"}),
    "added-neg": _put("added_tokens", 0, "id", value=-5),
    "added-str": _put("added_tokens", 0, "id", value="x"),
    "added-big": _put("added_tokens", 0, "id", value=2**32),
    "added-int": _put("added_tokens", value=7),
    "added-no-id": lambda core: core["added_tokens"][0].pop("id") and None,
    "added-content-int": _put("added_tokens", 0, "content", value=7),
    "added-content-empty": _put("added_tokens", 0, "content", value=""),
    "added-many": lambda core: core["added_tokens"].extend(
        {**core["added_tokens"][0], "id": 100 + i, "content": f"<{i}>"} for i in range(3000)
    ),
    "version-other": _put("version", value="9.9"),
    "version-int": _put("version", value=9),
    "truncation-bad": _put("truncation", value=7),
    "truncation-one": _put(
        "truncation",
        value={"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
    ),
    "truncation-zero": _put(
        "truncation",
        value={"max_length": 0, "strategy": "LongestFirst", "stride": 9, "direction": "Right"},
    ),
    "padding-odd": _put(
        "padding",
        value={
            "strategy": {"Fixed": 10**6}, "direction": "Left", "pad_to_multiple_of": None,
            "pad_id": 99, "pad_type_id": 0, "pad_token": "<gone>",
        },
    ),
}  # fmt: skip


def _sequence(key: str, depth: int) -> Any:
    inner: Any = {"type": "Lowercase"} if key == "normalizers" else {"type": "WhitespaceSplit"}
    for _ in range(depth):
        inner = {"type": "Sequence", key: [inner]}
    return inner


KEYS = {
    "tokenizer_class": ("list", "dict", "str", "null", "escape", "empty", "long"),
    "model_max_length": ("str", "neg", "zero", "1e30", "list", "dict", "float", "null", "nan"),
    "bos_token": ("int", "list", "dict", "str", "empty", "null", "bool"),
    "eos_token": ("list", "dict", "str", "empty", "null", "bool"),
    "unk_token": ("int", "list", "dict", "null"),
    "pad_token": ("int", "list", "dict", "str", "escape"),
    "added_tokens_decoder": ("int", "str", "list", "dict"),
    "additional_special_tokens": ("int", "str", "list", "dict"),
    "extra_special_tokens": ("int", "str", "list", "dict"),
    "padding_side": ("int", "str", "list"),
    "truncation_side": ("int", "str"),
    "clean_up_tokenization_spaces": ("str", "int", "list"),
    "auto_map": ("int", "str", "list", "dict"),
    "model_input_names": ("int", "str", "list"),
    "add_bos_token": ("str", "list"),
    "tokenizer_file": ("int", "str"),
    "processor_class": ("int", "list"),
    "backend": ("int", "str", "list"),
}
"""Keys of ``tokenizer_config.json``, with the kinds of values that are tried."""

FILES: dict[str, tuple[str, str, Any]] = {
    "special-map-bad": (SPECIAL, "[]", "any"),
    "special-map-int": (SPECIAL, '{"eos_token": 7}', "any"),
    "special-map-deep": (SPECIAL, deep('{"a":', "}", 100_000, "1"), "any"),
    "special-map-dict": (SPECIAL, '{"eos_token": {"content": 7}}', "any"),
    "added-file-list": ("added_tokens.json", "[]", "any"),
    "added-file-str": ("added_tokens.json", '{"<a>": "x"}', "any"),
    "gen-not-json": (STOPS, "{", "refuse"),
    "gen-list": (STOPS, "[1]", "refuse"),
}


def _stops() -> Iterator[Case]:
    for name, value in {
        "str": "abc", "dict": {"a": 1}, "list-str": ["a"], "list-dict": [{"a": 1}], "float": 1.5,
        "neg": -1, "list-neg": [-1], "1e30": 10**30, "list-1e30": [10**30], "bool": True,
        "nan": float("nan"), "list-null": [None], "list-list": [[2]], "beyond": 10**6,
    }.items():  # fmt: skip
        text = json.dumps({"eos_token_id": value})
        expect = "any" if name in ("beyond", "list-null", "bool") else "refuse"
        yield Case(f"tk/gen-eos-{name}", _file(STOPS, text), expect)


def _found() -> Iterator[Case]:
    """What found a fault once, under the names that it had then."""
    for name, keys, expect in (
        ("class-int", {"tokenizer_class": 7}, "refuse"),
        ("class-list", {"tokenizer_class": ["a"]}, "refuse"),
        ("eos-int", {"eos_token": 7}, "refuse"),
        ("maxlen-str", {"model_max_length": "x"}, "any"),
        ("extra-special", {"extra_special_tokens": 7}, "any"),
        ("added-tokens-bad", {"added_tokens_decoder": {"x": {"content": "<s>"}, "1": 7}}, "any"),
        ("code-remote", {"auto_map": {"AutoTokenizer": ["evil.E", None]}}, "any"),
    ):
        yield Case(f"tk/{name}", _edited(SETTINGS, lambda found, k=keys: found | k), expect)
    yield Case("tk/only-spm-garbage", _only("tokenizer.model", b"\0garbage\xff" * 9))
    yield Case("tk/only-vocab-txt", _only("vocab.txt", b"\xff\xfe"), "any")
    yield Case("tk/only-vocab-json", _only("vocab.json", b"[1]"), "any")
    yield Case("tk/gone", _only("other", b""))


CHATS_APART = (
    "endless",
    "pow",
    "tojson",
    "center",
    "clock-huge",
    "huge-range",
    "huge-text",
    "long-loop",
    "deep",
    "redos",
)
CHATS: dict[str, Any] = {
    "zero-div": "{{ 1 // 0 }}",
    "pow": "{{ 9 ** 9 ** 9 }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "escape-import": "{% import 'os' as os %}{{ os }}",
    "escape-include": "{% include '/etc/passwd' %}",
    "escape-class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "escape-globals": "{{ raise_exception.__globals__ }}",
    "escape-format": "{{ '{0.__class__}'.format(7).__class__ }}",
    "list": [1],
    "dict": {"a": 1},
    "two-none-default": [{"name": "a", "template": "x"}, {"name": "b", "template": "y"}],
    "entry-odd": [{"name": "default"}],
    "constant": "always the same",
    "empty": "",
    "syntax": "{% if %}",
    "open": "{{ messages",
    "undefined-call": "{{ gone() }}",
    "undefined-attribute": "{{ gone.more }}",
    "type": "{{ 'a' + 1 }}",
    "index": "{{ messages[99].content }}",
    "key": "{{ messages[0]['gone']['more'] }}",
    "raises": "{{ raise_exception('no\\n\x1b[2J') }}",
    "raises-long": "{{ raise_exception('x' * 100000) }}",
    "filter-unknown": "{{ messages | gone }}",
    "endless": "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "huge-range": "{{ range(10 ** 12) | list }}",
    "huge-text": "{{ 'x' * (10 ** 12) }}",
    "long-loop": "{% for i in range(99999) %}{{ messages[0].content * 1000 }}{% endfor %}",
    "deep": "{{ " + deep("(", ")", 3000, "1") + " }}",
    "no-answer": "{{ messages[0].content }}",
    "answer-first": "{{ messages[-1].content }}{{ messages[0].content }}",
}
UNSURE_CHATS = {
    "whitespace": "{% for m in messages %} {% endfor %}",
    "random": "{{ range(9) | random }}{{ messages[0].content }}",
    "clock": "{{ strftime_now('%Y %f') }}{{ messages }}",
    "clock-huge": "{{ strftime_now('%' * 100000) }}{{ messages }}",
    "sort": "{{ messages | sort }}",
    "tojson": "{{ messages | tojson(indent=10**9) }}",
    "center": "{{ 'a' | center(10**10) }}",
    "nul": "\0{{ messages[0].content }}\0{{ messages[1].content }}",
}


def _edited(file: str, change: Callable[[Any], Any]):
    def make(place: Place) -> Arguments:
        place.edit(place.text / "model" / file, change)
        return _scored(place)

    return make


def _scored(place: Place, **data: Any) -> Arguments:
    """A run with a score, whose answers end at the stop tokens."""
    return place.train(place.text_tree(eval={"task": "exact_match"}, data=data))


def _file(file: str, content: str):
    def make(place: Place) -> Arguments:
        (place.text / "model" / file).write_text(content)
        return _scored(place)

    return make


def _only(name: str, content: bytes):
    def make(place: Place) -> Arguments:
        model: Path = place.text / "model"
        for file in (CORE, SETTINGS):
            (model / file).unlink()
        (model / name).write_bytes(content)
        return _scored(place)

    return make


def _chat(template: Any, **data: Any):
    def make(place: Place) -> Arguments:
        found = {"chat_template": template}
        place.edit(place.text / "model" / SETTINGS, lambda settings: settings | found)
        return _scored(place, template="chat", max_length=60, **data)

    return make
