"""Folders to write to: those of a user, those that cannot be, and names that are none."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.bad_inputs.case import MINE, Arguments, Case, Place
from tests.tiny_run import write_model


def cases() -> Iterator[Case]:
    """All of them."""
    for name, (make, expect) in NAMES.items():
        for verb, command in VERBS.items():
            stem = f"wd/{name}" if verb == "train" else f"wd/{verb}-{name}"
            yield Case(stem, _named(make, command), expect, stop="step")
    for name, (fill, expect) in HELD.items():
        yield Case(f"wd/{name}", _filled(fill), expect, stop="step")
    for name, (fill, expect) in RESUMED.items():
        yield Case(f"wd/resume-{name}", _resumed(fill), expect, stop="step")
    yield Case("wd/checkpoints-is-file-resume", _checkpoints_file, stop="step")
    for name, fill in FULL.items():
        yield Case(f"wd/full-{name}", _full(fill), stop="step")
    for name, fill in OUT.items():
        for kind in ("peft", "merged"):
            yield Case(f"wd/export-{kind}-{name}", _exported(fill, kind))


def _train(place: Place, workdir: Any) -> Arguments:
    return place.train(place.run_tree(), workdir=workdir)


def _study(place: Place, workdir: Any) -> Arguments:
    tree = place.run_tree(study={"variants": {"a": {}}})
    return ["study", place.config(tree), "--workdir", workdir]


def _export(place: Place, workdir: Any) -> Arguments:
    return ["export", place.config(), "--workdir", workdir, "--out", place.folder / "out" / "new"]


VERBS: dict[str, Callable[[Place, Any], Arguments]] = {
    "train": _train,
    "study": _study,
    "export": _export,
}


def _linked(place: Place) -> Path:
    link = place.folder / "a"
    link.symlink_to("a")
    return link


def _dangling(place: Place) -> Path:
    link = place.folder / "a"
    link.symlink_to("gone")
    return link


def _file(place: Place) -> Path:
    file = place.folder / MINE
    file.write_text("mine")
    return file


NAMES: dict[str, tuple[Callable[[Place], Any], Any]] = {
    "empty-string": (lambda place: "", "refuse"),
    "blank": (lambda place: "  ", "refuse"),
    "file": (_file, "refuse"),
    "below-file": (lambda place: _file(place) / "run", "refuse"),
    "link-loop": (_linked, "refuse"),
    "link-loop-below": (lambda place: _linked(place) / "run", "refuse"),
    "link-to-nothing": (_dangling, "any"),
    "long-name": (lambda place: place.folder / ("x" * 300), "refuse"),
    "long-path": (lambda place: place.folder / ("x/" * 3000), "refuse"),
    "nul": (lambda place: f"{place.folder}/a\0b", "refuse"),
    "proc": (lambda place: "/proc/balora", "refuse"),
    "device": (lambda place: "/dev/null", "refuse"),
    "scheme": (lambda place: "s3://bucket/run", "refuse"),
    "scheme-unknown": (lambda place: "nope://bucket/run", "refuse"),
    "tilde-nobody": (lambda place: "~nobody_of_this_name/run", "any"),
}


def _named(make: Callable[[Place], Any], command: Callable[[Place, Any], Arguments]):
    return lambda place: command(place, make(place))


Fill = Callable[[Path], Any]


def _write(name: str, content: str = "mine") -> Fill:
    def fill(folder: Path) -> None:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)

    return fill


def _folder(name: str) -> Fill:
    """A folder where a file belongs, with something of the user's in it."""
    return _write(f"{name}/{MINE}.txt")


def _link(name: str, to: str) -> Fill:
    def fill(folder: Path) -> None:
        (folder / name).symlink_to(to)

    return fill


HELD: dict[str, tuple[Fill, Any]] = {
    "foreign-metrics": (_write("metrics.jsonl", '{"mine": 1}\n'), "refuse"),
    "foreign-summary": (_write("summary.json", '{"mine": 1}\n'), "refuse"),
    "foreign-curves": (_write("curves.png"), "refuse"),
    "foreign-adapter": (_write("adapter/adapter_config.json", "{}"), "refuse"),
    "foreign-config": (_write("config.yaml", "mine: 1\n"), "refuse"),
    "foreign-checkpoints": (_folder("checkpoints"), "refuse"),
    "is-model": (write_model, "refuse"),
    "tokenfile": (_write("hosts_see_this"), "any"),
    "config-folder": (_folder("config.yaml"), "refuse"),
    "metrics-folder": (_folder("metrics.jsonl"), "refuse"),
    "summary-folder": (_folder("summary.json"), "refuse"),
    "curves-folder": (_folder("curves.png"), "refuse"),
    "adapter-file": (_write("adapter"), "refuse"),
    "adapter-other": (_folder("adapter"), "refuse"),
    "checkpoints-file": (_write("checkpoints"), "refuse"),
    "checkpoints-link": (_link("checkpoints", "/tmp"), "refuse"),
    "checkpoints-link-loop": (_link("checkpoints", "checkpoints"), "refuse"),
    "adapter-link": (_link("adapter", "/tmp"), "refuse"),
    "metrics-link": (_link("metrics.jsonl", "/dev/full"), "refuse"),
    "own-file": (_write(f"{MINE}.txt"), "any"),
    "own-folder": (_folder("notes"), "any"),
    "partial-config": (_write("config.yaml.partial", "what a kill left"), "any"),
}  # fmt: skip


def _filled(fill: Fill):
    def make(place: Place) -> Arguments:
        place.workdir.mkdir()
        fill(place.workdir)
        return _train(place, place.workdir)

    return make


RESUMED: dict[str, tuple[Fill, Any]] = {
    "best": (_folder("checkpoints/best"), "any"),
    "checkpoint-500": (_folder("checkpoints/checkpoint-500"), "any"),
    "backup": (_folder("checkpoints/2.bak"), "any"),
    "file-of-the-user": (_write(f"checkpoints/{MINE}.txt"), "any"),
    "number-file": (_write("checkpoints/9"), "any"),
    "number-folder-empty": (lambda f: (f / "checkpoints" / "9").mkdir(), "any"),
    "number-folder-full": (_folder("checkpoints/9"), "any"),
    "tmp-folder": (_folder("checkpoints/3.orbax-checkpoint-tmp"), "any"),
    "config-gone": (lambda f: (f / "config.yaml").unlink(), "any"),
    "config-garbage": (_write("config.yaml", "\0"), "any"),
    "config-folder": (lambda f: ((f / "config.yaml").unlink(), _folder("config.yaml")(f)), "refuse"),
    "metrics-folder": (
        lambda f: ((f / "metrics.jsonl").unlink(), _folder("metrics.jsonl")(f)), "refuse",
    ),
    "metrics-link-loop": (
        lambda f: ((f / "metrics.jsonl").unlink(), _link("metrics.jsonl", "metrics.jsonl")(f)),
        "refuse",
    ),
    "adapter-file": (lambda f: (shutil.rmtree(f / "adapter"), _write("adapter")(f)), "refuse"),
    "adapter-other": (_write(f"adapter/{MINE}.txt"), "refuse"),
    "summary-folder": (
        lambda f: ((f / "summary.json").unlink(), _folder("summary.json")(f)), "refuse",
    ),
    "curves-folder": (_folder("curves.png/x"), "any"),
    "checkpoints-gone": (lambda f: shutil.rmtree(f / "checkpoints"), "any"),
    "checkpoints-empty": (
        lambda f: (shutil.rmtree(f / "checkpoints"), (f / "checkpoints").mkdir()), "any",
    ),
    "checkpoints-link-loop": (
        lambda f: (shutil.rmtree(f / "checkpoints"), _link("checkpoints", "checkpoints")(f)),
        "refuse",
    ),
    "negative": (lambda f: (f / "checkpoints" / "2").rename(f / "checkpoints" / "-2"), "any"),
    "zeros": (lambda f: (f / "checkpoints" / "2").rename(f / "checkpoints" / "002"), "any"),
    "huge-number": (_folder("checkpoints/" + "9" * 200), "any"),
    "renamed": (lambda f: (f / "checkpoints" / "2").rename(f / "checkpoints" / "3"), "any"),
}  # fmt: skip


def _resumed(fill: Fill):
    def make(place: Place) -> Arguments:
        if (place.run / "curves.png").is_file():
            (place.run / "curves.png").unlink()
        fill(place.run)
        return place.resume()

    return make


def _checkpoints_file(place: Place) -> Arguments:
    place.workdir.mkdir()
    (place.workdir / "config.yaml").write_text("{}")
    (place.workdir / "checkpoints").write_text("mine")
    return place.train(place.run_tree(), "--resume")


FULL: dict[str, Fill] = {
    "model": _folder("model"),
    "model-file": _write("model"),
    "model-link": _link("model", "/tmp"),
}


def _full(fill: Fill):
    """A full fine-tuning, which writes a whole model."""

    def make(place: Place) -> Arguments:
        place.workdir.mkdir()
        fill(place.workdir)
        return place.train(place.run_tree(adapter={"method": "full"}))

    return make


OUT: dict[str, Callable[[Place], Any]] = {
    "file": _file,
    "below-file": lambda place: _file(place) / "new",
    "full": lambda place: (_write(f"{MINE}.txt")(place.folder / "x"), place.folder / "x")[1],
    "run": lambda place: place.run,
    "adapter": lambda place: place.run / "adapter",
    "checkpoint": lambda place: place.text / "model",
    "empty-string": lambda place: "",
    "long-name": lambda place: place.folder / ("x" * 300),
    "nul": lambda place: f"{place.folder}/a\0b",
    "link-loop": _linked,
    "link-to-nothing": _dangling,
    "proc": lambda place: "/proc/balora",
    "folder-now": lambda place: ".",
}


def _exported(out: Callable[[Place], Any], kind: str):
    def make(place: Place) -> Arguments:
        json.loads((place.run / "adapter" / "adapter_config.json").read_text())
        command = ["export", place.config(place.run_tree()), "--workdir", place.run]
        return [*command, "--format", kind, "--out", out(place)]

    return make
