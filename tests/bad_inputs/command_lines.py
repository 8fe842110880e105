"""The command line of every verb: options that are missing, absurd, or that name what cannot be."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.bad_inputs.case import MINE, Arguments, Case, Place

NUMBERS = {
    "word": "x", "empty": "", "float": "1.5", "zero": "0", "neg": "-1", "nan": "nan", "inf": "inf",
    "huge": "1" + "0" * 30, "digits": "9" * 5000, "superscript": "²", "nul": "1\0", "lines": "1\n2",
    "escape": "\x1b[2J",
}  # fmt: skip
WORDS = {
    "word": "x", "empty": "", "long": "x" * 5000, "nul": "a\0b", "lines": "a\nb",
    "escape": "\x1b[2J", "surrogate": "\udcff",
}  # fmt: skip
INTEGERS = {
    "bench": ("--rounds",),
    "plan": ("--candidates",),
    "export": ("--rank",),
    "train": ("--processes", "--process", "--host-timeout"),
}
NAMES = {
    "bench": ("--case", "--against", "--topology"),
    "plan": ("--topology", "--mesh", "--head"),
    "export": ("--format", "--push-to-hub"),
    "study": ("--only",),
    "train": ("--coordinator",),
}


def cases() -> Iterator[Case]:
    """All of them."""
    for verb, options in INTEGERS.items():
        for option in options:
            for kind, text in NUMBERS.items():
                large = kind == "huge" or (kind, option) in (("zero", "--process"),)
                expect = "any" if large else "refuse"
                yield Case(f"cli/{verb}{option}-{kind}", _more(verb, option, text), expect)
    for kind, text in NUMBERS.items():
        if kind != "huge":
            yield Case(f"cli/plan--utilisation-{kind}", _more("plan", "--utilisation", text))
    for verb, options in NAMES.items():
        for option in options:
            for kind, text in WORDS.items():
                yield Case(f"cli/{verb}{option}-{kind}", _more(verb, option, text))
    for name, text in TOPOLOGIES.items():
        for verb in ("plan", "bench"):
            make = _more(verb, "--topology", text)
            yield Case(f"cli/{verb}-topology-{name}", make, "any" if name in LARGE else "refuse")
    for name, text in MESHES.items():
        yield Case(f"cli/plan-mesh-{name}", _more("plan", "--mesh", text))
    yield from _files()
    yield from _found()
    yield from _shape()


TOPOLOGIES = {
    "chips-none": "v5e:", "shape-zero": "v5e:0x4", "shape-one": "v5e:4", "shape-four": "v5e:2x2x2x2",
    "unknown": "v99:4x4", "gpu-none": "gpu:0x80GB", "gpu-unknown": "gpu:8xZ9", "gpu-memory": "gpu:8x0GB",
    "gpu-crowded": "gpu:2x16xH100", "gpu-parts": "gpu:2x2x2xH100", "gpu-hosts": "gpu:0x8xH100",
    "cpu-none": "cpu:0", "cpu-word": "cpu:x", "superscript": "cpu:²", "tpu-digits": "v5e:" + "9" * 99 + "x4",
    "cpu-digits": "cpu:" + "9" * 99, "gpu-digits": f"gpu:{'9' * 99}x80GB", "cpu-huge": "cpu:1000000",
    "cpu-5000digits": "cpu:" + "9" * 5000,
}  # fmt: skip
LARGE = ("tpu-digits", "cpu-digits", "gpu-digits", "gpu-memory", "cpu-huge")
MESHES = {
    "no-size": "data", "no-axis": "=2", "unknown": "rows=2", "zero": "data=0", "neg": "data=-2",
    "word": "data=x", "superscript": "data=²", "two-rest": "data=-1,fsdp=-1", "too-many": "data=64",
    "digits": "data=" + "9" * 5000, "huge": "data=" + "9" * 30, "minus": "data=--1", "comma": ",",
    "twice": "data=1,data=64",
}  # fmt: skip


def _command(place: Place, verb: str) -> list[Any]:
    """A command line that is good as it stands."""
    if verb == "study":
        config = place.config(place.text_tree(study={"variants": {"a": {}}}))
        return [verb, config, "--workdir", place.workdir]
    if verb == "export":
        config = place.config(place.run_tree())
        return [verb, config, "--workdir", place.run, "--out", place.folder / "out" / "new"]
    config = place.config(place.text_tree(eval={"task": "exact_match"}))
    more = {
        "train": ["--workdir", place.workdir],
        "generate": ["--prompt", "1+1"],
    }.get(verb, [])
    return [verb, config, *more]


def _more(verb: str, *words: Any) -> Callable[[Place], Arguments]:
    """With an option as one word, so that a value that begins with a dash is its own."""
    option, value = words
    return lambda place: [*_command(place, verb), f"{option}={value}"]


VERBS = ("train", "eval", "generate", "export", "plan", "bench", "study")
REPORTS: dict[str, Callable[[Path], Any]] = {
    "no-folder": lambda folder: folder / "gone" / "x.json",
    "folder": lambda folder: folder / "out",
    "below-file": lambda folder: folder / "config.yaml" / "x.json",
    "long-name": lambda folder: folder / ("a" * 300 + ".json"),
    "device": lambda folder: "/dev/null",
    "pipe": lambda folder: _piped(folder / "a.json"),
    "config": lambda folder: folder / "config.yaml",
    "users-file": lambda folder: _users(folder / "a.json"),
    "link": lambda folder: _linked(folder / "a.json"),
    "long-path": lambda folder: folder / ("a/" * 3000) / "x.json",
    "nul": lambda folder: f"{folder}/a\0.json",
    "empty": lambda folder: "",
    "proc": lambda folder: "/proc/x.json",
    "link-loop": lambda folder: _loop(folder / "a.json"),
    "escape": lambda folder: folder / "gone\x1b[2J\n" / "x.json",
}
PICTURES = {
    "suffix": lambda folder: folder / "x.xyz",
    "suffix-none": lambda folder: folder / "x",
    "suffix-svgz": lambda folder: folder / "x.svgz",
    **{name: (lambda f, make=make: str(make(f)).replace(".json", ".png")) for name, make in
       REPORTS.items()},
}  # fmt: skip


def _both(file: Path) -> tuple[Path, Path]:
    """A report and a picture of one name."""
    return file, file.with_suffix(".png")


def _piped(file: Path) -> Path:
    for one in _both(file):
        os.mkfifo(one)
    return file


def _users(file: Path) -> Path:
    for one in _both(file):
        one.write_text('{"mine": 1}\n')
    return file


def _linked(file: Path) -> Path:
    for one in _both(file):
        one.with_name(f"mine{one.suffix}").write_text("{}\n")
        one.symlink_to(f"mine{one.suffix}")
    return file


def _loop(file: Path) -> Path:
    for one in _both(file):
        one.symlink_to(one.name)
    return file


def _files() -> Iterator[Case]:
    for verb in VERBS[1:]:
        for name, make in REPORTS.items():
            yield Case(f"cli/{verb}-json-{name}", _file(verb, "--json", make))
    for verb in ("plan", "bench", "study"):
        for name, make in PICTURES.items():
            yield Case(f"cli/{verb}-picture-{name}", _file(verb, "--picture", make))
    for verb in ("eval", "generate"):
        for name, text in {**WORDS, "file": "config.yaml", "folder": "text"}.items():
            yield Case(f"cli/{verb}-adapter-{name}", _more(verb, "--adapter", text))


def _file(verb: str, option: str, make: Callable[[Path], Any]) -> Callable[[Place], Arguments]:
    def made(place: Place) -> Arguments:
        command = _command(place, verb)
        return [*command, f"{option}={make(place.folder)}"]

    return made


def _found() -> Iterator[Case]:
    """What found a fault once, under the names that it had then."""
    gone = lambda folder: folder / "gone" / "x.png"  # noqa: E731
    yield Case("cli/plan-picture", _file("plan", "--picture", gone))
    yield Case("cli/plan-picture-ext", _file("plan", "--picture", PICTURES["suffix"]))
    yield Case("cli/bench-picture", _file("bench", "--picture", gone))
    yield Case("cli/study-longname", _long_variant)


def _long_variant(place: Place) -> Arguments:
    tree = place.text_tree(study={"variants": {"a" * 300: {}}})
    return ["study", place.config(tree), "--workdir", place.workdir]


STUDIES: dict[str, Any] = {
    "name-slash": {"variants": {"a/b": {}}},
    "name-up": {"variants": {"..": {}}},
    "name-nul": {"variants": {"a\0": {}}},
    "name-escape": {"variants": {"\x1b[2J\n": {}}},
    "name-empty": {"variants": {"": {}}},
    "name-reserved": {"variants": {"a": {}}, "datasets": {"study.json": {}, "a" * 300: {}}},
    "none": {"variants": {}},
    "datasets-none": {"variants": {"a": {}}, "datasets": {}},
    "seeds-none": {"variants": {"a": {}}, "seeds": []},
    "seeds-twice": {"variants": {"a": {}}, "seeds": [1, 1]},
    "seeds-neg": {"variants": {"a": {}}, "seeds": [-1]},
    "seeds-huge": {"variants": {"a": {}}, "seeds": [10**30]},
    "setting-unknown": {"variants": {"a": {"adapter.no_such_key": 1}}},
    "setting-section": {"variants": {"a": {"adapter": 7}}},
    "setting-study": {"variants": {"a": {"study.seeds": [1]}}},
    "setting-seed": {"variants": {"a": {"training.seed": 1}}},
    "setting-below": {"variants": {"a": {"adapter.rank.x": 1}}},
    "setting-empty": {"variants": {"a": {"": 1}}},
    "setting-dots": {"variants": {"a": {"...": 1}}},
    "setting-bad": {"variants": {"a": {"adapter.rank": "x"}}},
}


def _study(study: Any) -> Callable[[Place], Arguments]:
    def make(place: Place) -> Arguments:
        return ["study", place.config(place.text_tree(study=study)), "--workdir", place.workdir]

    return make


def _shape() -> Iterator[Case]:
    """Commands that are none."""
    for name, study in STUDIES.items():
        yield Case(f"cli/study-{name}", _study(study))
    yield Case("cli/unknown-verb", lambda place: ["no_such_verb"])
    yield Case("cli/verb-escape", lambda place: ["\x1b[2J\n"])
    yield Case("cli/verb-long", lambda place: ["x" * 5000])
    for verb in VERBS:
        yield Case(f"cli/{verb}-no-config", lambda place, verb=verb: [verb])
        yield Case(f"cli/{verb}-unknown-option", _more(verb, "--no-such-option", "1"))
        yield Case(f"cli/{verb}-option-escape", _more(verb, "--\x1b[2J\n", "1"))
        yield Case(f"cli/{verb}-two-configs", lambda place, v=verb: [*_command(place, v), "b.yaml"])
        yield Case(f"cli/{verb}-set-nothing", lambda place, v=verb: [*_command(place, v), "--set"])
    yield Case("cli/plan-labels", lambda place: ["plan", place.config(place.labels_tree())])
    labels = lambda place: ["generate", place.config(place.labels_tree()), "--prompt", "a"]  # noqa: E731
    yield Case("cli/generate-labels", labels)
    yield Case("cli/bench-case-two", _more("bench", "--case", "LoRA, PiSSA"))
    yield Case("cli/export-rank-merged", _merged_rank)
    yield Case("cli/export-no-run", _no_run)
    yield Case("cli/export-private-alone", _words("export", "--private"))
    for kind, text in WORDS.items():
        if kind not in ("nul",):
            yield Case(f"cli/generate-prompt-{kind}", _more("generate", "--prompt", text), "any")
    yield Case("cli/generate-prompt-huge", _more("generate", "--prompt", "1" * 10**6), "any")
    for name, words in {
        "process-beyond": ("--coordinator=localhost:1", "--processes=2", "--process=2"),
        "process-alone": ("--process=0",),
        "processes-alone": ("--processes=2",),
        "coordinator-no-port": ("--coordinator=localhost", "--processes=2", "--process=0"),
        "coordinator-port": ("--coordinator=localhost:99999", "--processes=2", "--process=0"),
        "coordinator-port-word": ("--coordinator=localhost:x", "--processes=2", "--process=0"),
    }.items():
        yield Case(f"cli/train-{name}", _words("train", *words))


def _words(verb: str, *words: str) -> Callable[[Place], Arguments]:
    return lambda place: [*_command(place, verb), *words]


def _merged_rank(place: Place) -> Arguments:
    return [*_command(place, "export"), "--format=merged", "--rank=1"]


def _no_run(place: Place) -> Arguments:
    (place.folder / MINE).mkdir()
    return ["export", place.config(), "--workdir", place.folder / MINE, "--out", place.workdir]
