"""Files of rows of every format: broken, huge, deep, or not what their names say."""

import gzip
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.bad_inputs.case import Arguments, Case, Place
from tests.bad_inputs.values import deep
from tests.tiny_run import sums

ROWS = sums(12, 5)
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
GOOD_CSV = "question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in ROWS)
APART = (
    *("jsonl-nulls", "jsonl-deep10k", "jsonl-deep100k", "jsonl-deep100k-obj", "json-deep"),
    *("gz-bomb-line-2GB", "jsonl-int-5000digits", "jsonl-long-line", "fifo", "jsonl-wide"),
)


def cases() -> Iterator[Case]:
    """All of them."""
    for name, (file, content, expect) in FILES.items():
        yield Case(f"data/{name}", _file(file, content), expect, apart=name in APART)
    for name, cell in CELLS.items():
        sure = name in ("null", "list", "dict", "empty", "blank", "nan", "list-of-dicts")
        row = {"question": cell, "answer": "#1"}
        expect = "refuse" if sure else "any"
        make = _file("a.jsonl", (LINES + json.dumps(row) + "\n").encode())
        yield Case(f"data/cell-{name}", make, expect)
        row = {"question": "1+1", "answer": cell}
        make = _file("a.jsonl", (LINES + json.dumps(row) + "\n").encode(), "validation")
        yield Case(f"data/gold-{name}", make, expect)
    for name, change in INSTEAD.items():
        yield Case(f"data/{name}", _instead(change), apart=name in APART)
    for name, turns in TURNS.items():
        yield Case(f"data/turns-{name}", _turns(turns), "any" if name == "roles" else "refuse")
    yield from _labels()


CELLS: dict[str, Any] = {
    "null": None, "bool": True, "int": 7, "float": 1.5, "nan": float("nan"), "1e400": 10**400,
    "list": [1], "dict": {"a": 1}, "empty": "", "blank": " \n\t", "nul": "\0", "long": "1" * 10**6,
    "escape": "\x1b[2J", "surrogate": "\ud800", "list-of-dicts": [{"a": 1}], "separator": "\u2028",
}  # fmt: skip


def _packed(text: bytes) -> bytes:
    return gzip.compress(text, 1)


def _bomb() -> bytes:
    """Two gigabytes of one line, as two megabytes."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1) as file:
        file.write(b'{"question": "')
        block = b"x" * 2**24
        for _ in range(128):
            file.write(block)
    return packed.getvalue()


Content = bytes | Callable[[], bytes]
FILES: dict[str, tuple[str, Content, Any]] = {
    "jsonl-empty": ("a.jsonl", b"", "refuse"),
    "jsonl-blank": ("a.jsonl", b"\n\n \n", "refuse"),
    "jsonl-nulls": ("a.jsonl", b"\0" * 10**6, "refuse"),
    "jsonl-nul-in-line": ("a.jsonl", LINES.encode() + b'{"question": "\0"}\n', "refuse"),
    "jsonl-null-row": ("a.jsonl", LINES.encode() + b"null\n", "refuse"),
    "jsonl-list-row": ("a.jsonl", LINES.encode() + b"[1]\n", "refuse"),
    "jsonl-scalar-row": ("a.jsonl", LINES.encode() + b"7\n", "refuse"),
    "jsonl-cut": ("a.jsonl", LINES.encode()[:-9], "refuse"),
    "jsonl-deep10k": (
        "a.jsonl",
        f'{{"question": {deep("[", "]", 10_000)}, "answer": "1"}}\n'.encode() * 30,
        "refuse",
    ),
    "jsonl-deep100k": ("a.jsonl", deep("[", "]", 100_000).encode() + b"\n", "refuse"),
    "jsonl-deep100k-obj": ("a.jsonl", deep('{"a":', "}", 100_000, "1").encode() + b"\n", "refuse"),
    "json-deep": ("a.json", deep("[", "]", 100_000).encode(), "refuse"),
    "jsonl-int-5000digits": (
        "a.jsonl",
        LINES.encode() + b'{"question": ' + b"9" * 5000 + b', "answer": "#1"}\n',
        "refuse",
    ),
    "jsonl-latin-1": ("a.jsonl", b'{"question": "\xe9", "answer": "#1"}\n', "refuse"),
    "jsonl-utf-16": ("a.jsonl", LINES.encode("utf-16"), "refuse"),
    "jsonl-bom": ("a.jsonl", b"\xef\xbb\xbf" + LINES.encode(), "any"),
    "jsonl-duplicate-key": ("a.jsonl", b'{"question": "1", "question": "2", "answer": "#"}\n', "refuse"),
    "jsonl-wide": (
        "a.jsonl",
        (json.dumps({f"c{i}": i for i in range(20_000)} | ROWS[0]) + "\n").encode(),
        "any",
    ),
    "jsonl-other-columns": ("a.jsonl", LINES.encode() + b'{"q": "1", "a": "2"}\n', "refuse"),
    "jsonl-column-escape": ("a.jsonl", b'{"\\u001b[2J\\n": "1"}\n', "refuse"),
    "jsonl-column-long": ("a.jsonl", ('{"' + "k" * 10**5 + '": "1"}\n').encode(), "refuse"),
    "jsonl-columns-many": (
        "a.jsonl", (json.dumps({f"c{i}": i for i in range(3000)}) + "\n").encode(), "refuse",
    ),
    "jsonl-long-line": (
        "a.jsonl", b'{"question": "' + b"1" * 10**8 + b'", "answer": "#1"}\n', "any",
    ),
    "jsonl-nan": ("a.jsonl", b'{"question": NaN, "answer": "#1"}\n', "refuse"),
    "jsonl-trailing": ("a.jsonl", LINES.encode() + b'{"question": "1", "answer": "2"} x\n', "refuse"),
    "jsonl-binary": ("a.jsonl", bytes(range(256)) * 9, "refuse"),
    "json-no-list": ("a.json", b"7", "refuse"),
    "json-empty-list": ("a.json", b"[]", "refuse"),
    "json-mixed": ("a.json", json.dumps([ROWS[0], 7]).encode(), "refuse"),
    "gz-cut": ("a.jsonl.gz", _packed(LINES.encode())[:40], "refuse"),
    "gz-not": ("a.jsonl.gz", LINES.encode(), "refuse"),
    "gz-empty": ("a.jsonl.gz", b"", "refuse"),
    "gz-crc": ("a.jsonl.gz", _packed(LINES.encode())[:-8] + b"\0" * 8, "refuse"),
    "gz-garbage-after": ("a.jsonl.gz", _packed(LINES.encode()) + b"garbage", "any"),
    "gz-bomb-line-2GB": ("a.jsonl.gz", _bomb, "refuse"),
    "csv-empty": ("a.csv", b"", "refuse"),
    "csv-header-only": ("a.csv", b"question,answer\n", "refuse"),
    "csv-twice": ("a.csv", b"question,question,answer\n1,2,3\n", "refuse"),
    "csv-wide-row": ("a.csv", b"question,answer\n1,2,3\n", "refuse"),
    "csv-late-wide-row": ("a.csv", GOOD_CSV.encode() + b"1,2,3\n", "refuse"),
    "csv-short-row": ("a.csv", GOOD_CSV.encode() + b"1\n", "refuse"),
    "csv-open-quote": ("a.csv", GOOD_CSV.encode() + b'"1,2\n', "refuse"),
    "csv-cell-200k": ("a.csv", GOOD_CSV.encode() + b"1" * 200_000 + b",#1\n", "any"),
    "csv-header-200k": ("a.csv", b"q" * 200_000 + b",answer\n1,2\n", "any"),
    "csv-first-200k": ("a.csv", b"question,answer\n" + b"1" * 200_000 + b",#1\n", "any"),
    "csv-nul": ("a.csv", GOOD_CSV.encode() + b"\0,1\n", "any"),
    "csv-latin-1": ("a.csv", b"question,answer\n\xe9,1\n", "refuse"),
    "csv-utf-16": ("a.csv", GOOD_CSV.encode("utf-16"), "refuse"),
    "csv-blank-names": ("a.csv", b",\n1,2\n", "refuse"),
    "csv-semicolons": ("a.csv", GOOD_CSV.replace(",", ";").encode(), "refuse"),
    "tsv-cell-200k": (
        "a.tsv", GOOD_CSV.replace(",", "\t").encode() + b"1" * 200_000 + b"\t#1\n", "any",
    ),
    "tsv-first-200k": ("a.tsv", b"question\tanswer\n" + b"1" * 200_000 + b"\t#1\n", "any"),
    "parquet-empty": ("a.parquet", b"", "refuse"),
    "parquet-text": ("a.parquet", LINES.encode(), "refuse"),
    "parquet-magic": ("a.parquet", b"PAR1" + b"\0" * 64 + b"PAR1", "refuse"),
    "parquet-footer-huge": ("a.parquet", b"PAR1" + b"\xff" * 8 + b"PAR1", "refuse"),
    "json-cut": ("a.json", json.dumps(ROWS).encode()[:-9], "refuse"),
    "json-comma": ("a.json", b'[{"question": "1", "answer": "2"},]', "refuse"),
    "json-after": ("a.json", json.dumps(ROWS).encode() + b"x", "refuse"),
    "json-long-object": ("a.json", b'[{"question": "' + b"1" * 10**8, "refuse"),
    "csv-stray-quote": ("a.csv", GOOD_CSV.encode() + b'"1"2,#1\n', "refuse"),
    "tsv-return": ("a.tsv", b"question\tanswer\n1\r2\t#1\n", "refuse"),
    "arrow-empty": ("a.arrow", b"", "refuse"),
    "arrow-text": ("a.arrow", LINES.encode(), "refuse"),
    "arrow-magic": ("a.arrow", b"ARROW1\0\0" + b"\xff" * 64 + b"ARROW1", "refuse"),
    "arrow-continued": ("a.arrow", b"\xff" * 4096, "refuse"),
    "feather-first": ("a.feather", b"FEA1" + b"\0" * 64 + b"FEA1", "refuse"),
    "suffix-none": ("rows", LINES.encode(), "refuse"),
    "suffix-zip": ("a.zip", b"PK\x03\x04", "refuse"),
    "suffix-pickle": ("a.pkl", b"\x80\x04.", "refuse"),
    "suffix-py": ("a.py", b"import os", "refuse"),
    "name-glob": ("[*].jsonl", LINES.encode(), "any"),
    "name-escape": ("\x1b[2J\n.jsonl", b"", "refuse"),
}  # fmt: skip


def _file(name: str, content: Content, key: str = "train"):
    def make(place: Place) -> Arguments:
        file = place.folder / name
        file.write_bytes(content if isinstance(content, bytes) else content())
        return place.train(place.text_tree(data={key: str(file)}, eval={"task": "exact_match"}))

    return make


def _saved(folder: Path, state: str, name: str = "state.json") -> None:
    folder.mkdir()
    (folder / name).write_text(state)


INSTEAD: dict[str, Callable[[Path], Any]] = {
    "missing": lambda file: None,
    "folder": Path.mkdir,
    "saved-nothing": lambda file: _saved(file, "{}"),
    "saved-broken": lambda file: _saved(file, "{"),
    "saved-gone": lambda file: _saved(file, '{"_data_files": [{"filename": "a.arrow"}]}'),
    "saved-outside": lambda file: _saved(file, '{"_data_files": [{"filename": "../a.arrow"}]}'),
    "saved-numbers": lambda file: _saved(file, '{"_data_files": [7]}'),
    "saved-number": lambda file: _saved(file, '{"_data_files": 7}'),
    "saved-splits": lambda file: _saved(file, '{"splits": 7}', "dataset_dict.json"),
    "link-to-nothing": lambda file: file.symlink_to("gone"),
    "link-loop": lambda file: file.symlink_to(file.name),
    "fifo": os.mkfifo,
    "device": lambda file: file.symlink_to("/dev/zero"),
    "memory": lambda file: file.symlink_to("/proc/self/mem"),
}


def _instead(change: Callable[[Path], Any]):
    def make(place: Place) -> Arguments:
        file = place.folder / "other.jsonl"
        change(file)
        return place.train(place.text_tree(data={"train": str(file)}))

    return make


TURNS: dict[str, Any] = {
    "null": None, "str": "x", "empty": [], "int": 7, "dict": {"role": "user"}, "strings": ["a"],
    "no-content": [{"role": "user"}], "content-list": [{"role": "user", "content": ["a"]}],
    "content-null": [{"role": "user", "content": None}], "role-int": [{"role": [1], "content": "a"}],
    "roles": [{"role": "\x1b[2J", "content": "a"}, {"role": "assistant", "content": "b"}],
}  # fmt: skip


def _turns(turns: Any):
    def make(place: Place) -> Arguments:
        file = place.folder / "turns.jsonl"
        file.write_text(json.dumps({"turns": turns}) + "\n")
        settings = place.text / "model" / "tokenizer_config.json"
        template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        place.edit(settings, lambda found: found | {"chat_template": template})
        data = {"train": str(file), "messages_column": "turns", "template": "chat"}
        return place.train(place.text_tree(data=data))

    return make


def _labels() -> Iterator[Case]:
    """Rows of a run on labels."""
    for name, (row, data) in {
        "unknown": ({"text": "joy", "kind": "ugly"}, {}),
        "null": ({"text": "joy", "kind": None}, {}),
        "list": ({"text": "joy", "kind": ["good"]}, {}),
        "int-beyond": ({"text": "joy", "kind": 7}, {}),
        "bool": ({"text": "joy", "kind": True}, {}),
        "float": ({"text": "joy", "kind": 0.5}, {}),
        "text-null": ({"text": None, "kind": "good"}, {}),
        "text-int": ({"text": [1], "kind": "good"}, {}),
        "no-column": ({"texts": "joy", "kind": "good"}, {}),
        "score-text": ({"text": "joy", "kind": "x"}, {"labels": [], "regression": True}),
        "score-nan": ({"text": "joy", "kind": float("nan")}, {"labels": [], "regression": True}),
        "score-inf": ({"text": "joy", "kind": float("inf")}, {"labels": [], "regression": True}),
        "score-huge": ({"text": "joy", "kind": 10**400}, {"labels": [], "regression": True}),
        "labels-one": ({"text": "joy", "kind": "good"}, {"labels": ["good"]}),
        "labels-twice": ({"text": "joy", "kind": "good"}, {"labels": ["good", "good"]}),
        "columns-three": ({"text": "joy", "kind": "good"}, {"text_columns": ["a", "b", "c"]}),
        "glue-unknown": ({"text": "joy", "kind": "good"}, {"glue": "x", "text_columns": []}),
    }.items():
        expect = "any" if name in ("bool", "text-int", "labels-one") else "refuse"
        yield Case(f"data/labels-{name}", _label(row, data), expect)


def _label(row: dict[str, Any], data: dict[str, Any]):
    def make(place: Place) -> Arguments:
        file = place.folder / "rows.jsonl"
        file.write_text(json.dumps(row) + "\n")
        return place.train(place.labels_tree(data={"train": str(file), **data}))

    return make
