"""The YAML file itself: what is no YAML, no config, or no file."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.bad_inputs.case import Arguments, Case, Place
from tests.bad_inputs.values import deep

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n"
    for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


def cases() -> Iterator[Case]:
    """All of them."""
    for name, edit in TEXTS.items():
        yield Case(f"file/{name}", _text(edit), apart=name in APART)
    for name, content in BYTES.items():
        yield Case(f"file/{name}", _bytes(content))
    for name, make in NO_FILES.items():
        yield Case(f"file/{name}", make, apart=name == "fifo")
    for name, word in SET.items():
        yield Case(f"file/set-{name}", _set(word), apart=name == "bomb")


APART = (
    "bomb",
    "bomb-alias-in-field",
    "bomb-in-study",
    "merge-bomb",
    "deep-list-100k",
    "deep-map-100k",
    "deep",
)
TEXTS: dict[str, Callable[[str], str]] = {
    "empty": lambda good: "",
    "comment": lambda good: "# nothing\n",
    "list": lambda good: "- a\n- b\n",
    "scalar": lambda good: "just a text\n",
    "number": lambda good: "7\n",
    "null": lambda good: "null\n",
    "tab": lambda good: good.replace("  ", "\t", 1),
    "two-documents": lambda good: f"{good}\n---\n{good}",
    "cut": lambda good: good[: len(good) // 2] + '\n"',
    "duplicate-section": lambda good: f"{good}\ntraining:\n  max_steps: 3\n",
    "duplicate-key": lambda good: good.replace("  rank: 2\n", "  rank: 2\n  rank: 3\n"),
    "duplicate-nested": lambda good: f"{good}\nstudy: {{variants: {{a: {{}}, a: {{}}}}}}\n",
    "bomb": lambda good: f"{BOMB}{good}",
    "bomb-alias-in-field": lambda good: BOMB + good.replace("rank: 2\n", "rank: *j\n"),
    "bomb-in-study": lambda good: f"{good}\nstudy: {{variants: {{a: {_nested_aliases()}}}}}\n",
    "merge-bomb": lambda good: f"{good}\n" + _merges(),
    "alias-of-itself": lambda good: f"{good}\nstudy: &s {{variants: {{a: *s}}}}\n",
    "alias-unknown": lambda good: f"{good}\nstudy: *gone\n",
    "deep": lambda good: f"{good}\nstudy: {deep('{a: ', '}', 3000)}\n",
    "deep-list-100k": lambda good: f"{good}\nextensions: {deep('[', ']', 100_000)}\n",
    "deep-map-100k": lambda good: f"{good}\nstudy: {deep('{a: ', '}', 100_000)}\n",
    "date-bad": lambda good: good.replace("rank: 2\n", "rank: 2020-13-45\n"),
    "huge-scalar": lambda good: good.replace("\nadapter:", f"\nmodel: {'x' * 10**6}\nadapter:")
    .replace("model:\n", "old:\n", 1),
    "newline-in-value": lambda good: good.replace("rank: 2\n", 'rank: "nowhere\\nat all\\n"\n'),
    "escape-in-value": lambda good: good.replace("rank: 2\n", 'rank: "\\e[2J\\a"\n'),
    "escape-in-key": lambda good: f'{good}\n"\\e[2J\\n\\x9b": 1\n',
    "long-key": lambda good: f"{good}\n? {'k' * 5000}\n: 1\n",
    "list-as-key": lambda good: f"{good}\n? [a, b]\n: 1\n",
    "null-key": lambda good: f"{good}\nnull: 1\n",
    "number-key": lambda good: f"{good}\n7: 1\n",
    "python-tag": lambda good: f"{good}\nstudy: !!python/object/apply:os.getcwd []\n",
    "directive": lambda good: f"%YAML 9.9\n---\n{good}",
}  # fmt: skip
BYTES = {
    "nul": b"\0" * 64,
    "utf-16": "model: {}\n".encode("utf-16"),
    "latin-1": b"model: {name_or_path: caf\xe9}\n",
    "gzip": b"\x1f\x8b\x08\0\0\0\0\0",
    "png": b"\x89PNG\r\n\x1a\n",
    "surrogate": b"model: {name_or_path: '\xed\xa0\x80'}\n",
    "lone-escape": b'model: {name_or_path: "\\ud800"}\n',
}
SET = {
    "no-value": "training.max_steps",
    "no-key": "=3",
    "open": "training.seed=[1",
    "below-a-value": "model.name_or_path.x=1",
    "deep": f"adapter.alpha={deep('[', ']', 3000)}",
    "deep-key": ".".join(["a"] * 3000) + "=1",
    "bomb": "study={a: &a [x,x,x,x,x,x,x,x,x], "
    + ", ".join(
        f"{new}: &{new} [{', '.join(['*' + old] * 9)}]"
        for old, new in zip("abcdefghi", "bcdefghij", strict=True)
    )
    + "}",
    "tag": "adapter.alpha=!!int x",
    "date": "adapter.alpha=2020-13-45",
    "python": "adapter.alpha=!!python/name:os.system",
    "escape": "adapter.\x1b[2J\n=1",
    "value-escape": "adapter.alpha=\x1b[2J",
    "value-lines": 'adapter.alpha="a\\nb"',
    "long": "adapter.alpha=" + "x" * 20_000,
    "empty-part": "adapter..rank=3",
    "dot": ".=1",
    "duplicate": "adapter={rank: 2, rank: 3}",
    "section-null": "adapter=null",
    "surrogate": "adapter.alpha=\udcff",
}


def _nested_aliases() -> str:
    """Nine levels of nine, as one value."""
    text = "&a [x, x, x, x, x, x, x, x, x]"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True):
        text = f"&{new} [{text}, {', '.join(['*' + old] * 8)}]"
    return text


def _merges() -> str:
    lines = ["m0: &m0 {a: 1}\n"]
    for level in range(1, 30):
        lines.append(f"m{level}: &m{level} {{<<: [*m{level - 1}, *m{level - 1}]}}\n")
    return "".join(lines)


def _text(edit: Callable[[str], str]):
    return lambda place: place.train(edit(place.config().read_text()))


def _bytes(content: bytes):
    return lambda place: place.train(content)


def _set(word: str):
    return lambda place: place.train(None, "--set", word)


def _instead(make: Callable[[Path], None]):
    """Something else where the config should be."""

    def made(place: Place) -> Arguments:
        file = place.folder / "other.yaml"
        make(file)
        return ["train", file, "--workdir", place.workdir]

    return made


def _named(name: str):
    return lambda place: ["train", name, "--workdir", place.workdir]


def _unreadable(file: Path) -> None:
    """Root reads any file but the memory that is not there."""
    file.write_text("model: {}\n")
    file.chmod(0)
    if os.access(file, os.R_OK):
        file.unlink()
        file.symlink_to("/proc/self/mem")


NO_FILES = {
    "missing": _named("gone.yaml"),
    "long-name": _named("x" * 300 + ".yaml"),
    "long-path": _named("x/" * 3000 + "c.yaml"),
    "name-nul": _named("a\0b.yaml"),
    "name-empty": _named(""),
    "name-escape": _named("\x1b[2J\n.yaml"),
    "tilde": _named("~nobody_of_this_name/c.yaml"),
    "folder": _instead(Path.mkdir),
    "unreadable": _instead(_unreadable),
    "link-to-nothing": _instead(lambda file: file.symlink_to("gone")),
    "link-loop": _instead(lambda file: file.symlink_to(file.name)),
    "fifo": _instead(os.mkfifo),
    "device": _instead(lambda file: file.symlink_to("/dev/zero")),
    "below-a-file": _named("/etc/hostname/c.yaml"),
}
