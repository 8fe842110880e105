"""Checkpoints that were edited and sealed again: another version's, another tool's, a forger's."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from balora_jax.io import seals
from tests.bad_inputs.case import Arguments, Case, Place
from tests.bad_inputs.values import KINDS, deep
from tests.tiny_run import sums, write_rows, write_tokenizer


def cases() -> Iterator[Case]:
    """All of them."""
    for name, edit in {**RUN, **DATA}.items():
        file = "run" if name.startswith("run") else "data"
        yield Case(f"ck/{name}", _json(file, edit), "any", stop="step")
    for path in PATHS:
        for kind in ("null", "str", "neg", "list", "dict", "1e30", "nan", "bool"):
            file, *keys = path
            name = f"ck/{'.'.join(path)}-value-{kind}"
            yield Case(name, _json(file, _value(keys, KINDS[kind])), "any", stop="step")
    for name, change in STATE.items():
        yield Case(f"ck/{name}", _folder(change), "any", stop="step")
    for name, change in UNSEALED.items():
        yield Case(f"ck/{name}", _folder(change, sealed=False), "any", stop="step")
    for name, edit in METRICS.items():
        yield Case(f"ck/metrics-{name}", _metrics(edit), "any", stop="step")
    yield Case("ck/adapter-foreign-file", _foreign, "any", stop="step")
    yield Case("ck/resume-other-tokenizer", _other_tokenizer, stop="step")
    yield Case("ck/resume-other-rows", _other_rows, stop="step")
    yield Case("ck/resume-other-base", _other_base, stop="step")
    yield Case("ck/resume-less-rows", _less_rows, stop="step")
    yield Case("ck/norun-foreign-files", _no_run, stop="step")


RUN: dict[str, Callable[[Any], Any]] = {
    "run-list": lambda run: [],
    "run-empty": lambda run: {},
    "run-scalar": lambda run: 7,
    "run-null": lambda run: "null",
    "run-text": lambda run: "no JSON",
    "run-blank": lambda run: "",
    "run-no-base": lambda run: run.pop("base") and None,
    "run-base-int": lambda run: run.update(base=7),
    "run-base-null": lambda run: run.update(base=None),
    "run-base-other": lambda run: run.update(base="0" * 64),
    "run-base-escape": lambda run: run.update(base="\x1b[2J\n"),
    "run-extra": lambda run: run.update(version=9),
    "run-config-null": lambda run: run.update(config=None),
    "run-config-list": lambda run: run.update(config=[1]),
    "run-config-int": lambda run: run.update(config=7),
    "run-config-empty": lambda run: run.update(config={}),
    "run-config-more": lambda run: run["config"].update(newer={"a": 1}),
    "run-config-less": lambda run: run["config"].pop("adapter") and None,
    "run-config-key-more": lambda run: run["config"]["adapter"].update(newer=1),
    "run-config-key-less": lambda run: run["config"]["training"].pop("schedule") and None,
    "run-config-section-int": lambda run: run["config"].update(training=7),
    "run-config-long": lambda run: run["config"]["adapter"].update(start="x" * 10**5),
    "run-config-escape": lambda run: run["config"]["adapter"].update(start="\x1b[2J\n"),
    "run-deep": lambda run: deep('{"a":', "}", 100_000, "1"),
    "run-deep-value": lambda run: run["config"]["adapter"].update(start=_nested(400)),
    "run-digits": lambda run: f'{{"base": {"9" * 5000}}}',
}
DATA: dict[str, Callable[[Any], Any]] = {
    "data-list": lambda data: [],
    "data-empty": lambda data: {},
    "data-scalar": lambda data: 7,
    "data-text": lambda data: "no JSON",
    "data-deep": lambda data: deep("[", "]", 100_000),
    "data-batches-null": lambda data: data.update(batches=None),
    "data-batches-empty": lambda data: data.update(batches={}),
    "data-batches-more": lambda data: data["batches"].update(newer=1),
    "data-before-list": lambda data: data.update(before=[1]),
    "data-before-int": lambda data: data.update(before=7),
    "data-before-gone": lambda data: data.pop("before") and None,
    "data-extra": lambda data: data.update(newer=1),
    "data-position-null": lambda data: data["batches"].update(position=None),
    "data-position-neg": lambda data: data["batches"]["position"].update(next_index=-5),
    "data-position-str": lambda data: data["batches"]["position"].update(next_index="x"),
    "data-position-huge": lambda data: data["batches"]["position"].update(next_index=10**30),
    "data-position-float": lambda data: data["batches"]["position"].update(next_index=1.5),
    "data-position-beyond": lambda data: data["batches"]["position"].update(next_index=10**6),
    "data-position-empty": lambda data: data["batches"].update(position={}),
    "data-seed": lambda data: data["batches"].update(seed=7),
    "data-examples": lambda data: data["batches"].update(examples="0" * 64),
}
PATHS = (
    ("run", "base"),
    ("run", "config", "adapter"),
    ("run", "config", "training", "learning_rate"),
    ("run", "config", "training", "max_steps"),
    ("data", "before"),
    ("data", "batches", "batch_size"),
    ("data", "batches", "mode"),
    ("data", "batches", "position"),
)


def _nested(depth: int) -> Any:
    found: Any = 1
    for _ in range(depth):
        found = [found]
    return found


def _value(keys: list[str], value: Any) -> Callable[[Any], None]:
    def edit(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return edit


def reseal(folder: Path) -> None:
    """Seal an edited checkpoint as this program would have."""
    (folder / seals.NAME).unlink(missing_ok=True)
    seals.seal(folder, int(folder.name))


def _only_newest(place: Place) -> Path:
    """The newest checkpoint, with the one before taken away."""
    folder = place.run / "checkpoints"
    shutil.rmtree(folder / "1", ignore_errors=True)
    return folder / "2"


def _json(file: str, edit: Callable[[Any], Any]):
    def make(place: Place) -> Arguments:
        newest = _only_newest(place)
        path = newest / file / "metadata"
        content = json.loads(path.read_text())
        found = edit(content)
        found = content if found is None else found
        path.write_text(found if isinstance(found, str) else json.dumps(found))
        reseal(newest)
        return place.resume()

    return make


def _folder(change: Callable[[Path], Any], *, sealed: bool = True):
    def make(place: Place) -> Arguments:
        newest = _only_newest(place)
        change(newest)
        if sealed:
            reseal(newest)
        return place.resume()

    return make


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


def _largest(folder: Path) -> Path:
    files = (path for path in (folder / "state").rglob("*") if path.is_file() and "d" in path.parts)
    return max(files, key=lambda path: path.stat().st_size)


STATE: dict[str, Callable[[Path], Any]] = {
    "state-metadata-gone": lambda f: (f / "state" / "_METADATA").unlink(),
    "state-metadata-garbage": lambda f: (f / "state" / "_METADATA").write_text("{nope"),
    "state-metadata-empty": lambda f: (f / "state" / "_METADATA").write_text("{}"),
    "state-metadata-list": lambda f: (f / "state" / "_METADATA").write_text("[]"),
    "state-metadata-deep": lambda f: (f / "state" / "_METADATA").write_text(
        deep("[", "]", 100_000)
    ),
    "state-sharding-garbage": lambda f: (f / "state" / "_sharding").write_text("{nope"),
    "state-sharding-gone": lambda f: (f / "state" / "_sharding").unlink(),
    "state-manifest-flip": lambda f: _flip(f / "state" / "manifest.ocdbt"),
    "state-manifest-gone": lambda f: (f / "state" / "manifest.ocdbt").unlink(),
    "state-data-flip": lambda f: _flip(_largest(f)),
    "state-data-cut": lambda f: _largest(f).write_bytes(_largest(f).read_bytes()[:9]),
    "state-data-gone": lambda f: [
        path.unlink() for path in (f / "state").rglob("*") if path.is_file() and "d" in path.parts
    ],
    "state-gone": lambda f: shutil.rmtree(f / "state"),
    "data-gone": lambda f: shutil.rmtree(f / "data"),
    "run-gone": lambda f: shutil.rmtree(f / "run"),
    "run-metadata-gone": lambda f: (f / "run" / "metadata").unlink(),
    "data-metadata-gone": lambda f: (f / "data" / "metadata").unlink(),
    "commit-gone": lambda f: [path.unlink() for path in f.rglob("commit_success.txt")],
    "checkpoint-metadata-gone": lambda f: (f / "_CHECKPOINT_METADATA").unlink(),
    "checkpoint-metadata-garbage": lambda f: (f / "_CHECKPOINT_METADATA").write_text("{nope"),
    "checkpoint-metadata-list": lambda f: (f / "_CHECKPOINT_METADATA").write_text("[1]"),
    "item-more": lambda f: shutil.copytree(f / "data", f / "more"),
    "all-gone": lambda f: [shutil.rmtree(path) for path in f.iterdir() if path.is_dir()],
    "arrays-of-another": lambda f: (f / "state" / "array_metadatas" / "process_0").write_text("{}"),
}
UNSEALED: dict[str, Callable[[Path], Any]] = {
    "dir-superscript": lambda f: (f.parent / "²").mkdir(),
    "dir-arabic": lambda f: (f.parent / "٣").mkdir(),
    "sums-only-empty": lambda f: (f / seals.NAME).write_text(""),
    "sums-garbage": lambda f: (f / seals.NAME).write_bytes(b"\xff\0" * 99),
    "sums-gone": lambda f: (f / seals.NAME).unlink(),
    "sums-folder": lambda f: ((f / seals.NAME).unlink(), (f / seals.NAME).mkdir()),
    "sums-link-loop": lambda f: ((f / seals.NAME).unlink(), (f / seals.NAME).symlink_to("SHA256SUMS")),
    "sums-up": lambda f: (f / seals.NAME).write_text("0" * 64 + "  ../../../text/train.jsonl\n"),
    "sums-absolute": lambda f: (f / seals.NAME).write_text("0" * 64 + "  /etc/passwd\n"),
    "sums-less": lambda f: (f / seals.NAME).write_text(
        (f / seals.NAME).read_text().split("\n", 1)[1]
    ),
    "file-more": lambda f: (f / "state" / "more").write_text("x"),
    "folder-link": lambda f: (shutil.move(f, f.parent.parent / "x"), f.symlink_to("../x")),
    "step-file": lambda f: (shutil.rmtree(f), f.write_text("x")),
    "empty-folder": lambda f: (shutil.rmtree(f), f.mkdir()),
}  # fmt: skip

METRICS: dict[str, Callable[[bytes], bytes]] = {
    "nul-tail-nl": lambda rows: rows + b"\0" * 64 + b"\n",
    "nul-tail": lambda rows: rows + b"\0" * 64,
    "binary-tail": lambda rows: rows + b"\xff\xfe",
    "binary-tail-nl": lambda rows: rows + b"\xff\xfe\n",
    "middle-broken": lambda rows: rows.replace(b":", b"", 1),
    "no-step": lambda rows: rows + b'{"loss": 1.0}\n',
    "step-str": lambda rows: rows + b'{"step": "x"}\n',
    "step-null": lambda rows: rows + b'{"step": null}\n',
    "step-list": lambda rows: rows + b'{"step": [1]}\n',
    "step-nan": lambda rows: rows + b'{"step": NaN}\n',
    "step-bool": lambda rows: rows + b'{"step": true}\n',
    "list-line": lambda rows: rows + b"[1]\n",
    "scalar-line": lambda rows: rows + b"7\n",
    "blank-lines": lambda rows: b"\n\n" + rows + b"\n \n",
    "torn-tail": lambda rows: rows[:-9],
    "deep-line": lambda rows: rows + deep("[", "]", 100_000).encode() + b"\n",
    "digits-line": lambda rows: rows + b'{"step": ' + b"9" * 5000 + b"}\n",
    "carriage-returns": lambda rows: rows.replace(b"\n", b"\r\n"),
    "separator": lambda rows: rows + '{"step": 1, "x": "\u2028"}\n'.encode(),
    "empty": lambda rows: b"",
}


def _metrics(edit: Callable[[bytes], bytes]):
    def make(place: Place) -> Arguments:
        file = place.run / "metrics.jsonl"
        file.write_bytes(edit(file.read_bytes()))
        return place.resume()

    return make


def _foreign(place: Place) -> Arguments:
    (place.run / "adapter" / "thesis.txt").write_text("mine")
    return place.resume()


def _other_tokenizer(place: Place) -> Arguments:
    arguments = place.resume()
    model = place.text / "model"
    core = json.loads((model / "tokenizer.json").read_text())
    vocabulary = core["model"]["vocab"]
    vocabulary["0"], vocabulary["1"] = vocabulary["1"], vocabulary["0"]
    (model / "tokenizer.json").write_text(json.dumps(core))
    return arguments


def _other_rows(place: Place) -> Arguments:
    arguments = place.resume()
    write_rows(place.text / "train.jsonl", sums(24, 9))
    return arguments


def _less_rows(place: Place) -> Arguments:
    arguments = place.resume()
    write_rows(place.text / "train.jsonl", sums(9, 0))
    return arguments


def _other_base(place: Place) -> Arguments:
    arguments = place.resume()
    place.edit(place.text / "model" / "config.json", lambda found: found | {"rope_theta": 7.0})
    write_tokenizer(place.text / "model")
    return arguments


def _no_run(place: Place) -> Arguments:
    """No run at all, but files under the names that a run has."""
    place.workdir.mkdir()
    for name in ("metrics.jsonl", "summary.json"):
        (place.workdir / name).write_text('{"mine": 1}\n')
    (place.workdir / "adapter").mkdir()
    (place.workdir / "adapter" / "thesis.txt").write_text("mine")
    return place.train(place.run_tree(), "--resume")
