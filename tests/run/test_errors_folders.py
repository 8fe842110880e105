"""Bad folders and the other commands: one sentence, nothing written."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.run.conftest import invoke, settings
from tests.tiny_run import sums, tree_digest, write_config, write_inputs, write_rows

ROOT = Path(__file__).parents[2]


def test_a_workdir_that_holds_a_run(place, finished):
    shutil.copytree(finished.workdir, place.workdir)
    place.refused(f"--workdir {place.workdir}", "one that holds a run", "--resume")


def test_a_workdir_that_is_a_file(place):
    place.workdir.write_text("")
    place.refused(f"--workdir {place.workdir}: expected a folder, got a file")


def test_a_workdir_below_a_file(place):
    (place.folder / "file").write_text("")
    workdir = place.folder / "file" / "run"
    place.refused(f"--workdir {workdir}", "Not a directory", workdir=workdir)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_a_workdir_that_cannot_be_written(place):
    place.refused("--workdir /proc/balora", "that can be written", workdir="/proc/balora")


def resumed(place, finished, **overrides):
    if not place.workdir.exists():
        shutil.copytree(finished.workdir, place.workdir)
    return [
        "train", finished.config, "--workdir", place.workdir, "--resume", *settings(overrides)
    ]  # fmt: skip


def test_resume_on_another_base(place, finished):
    other = place.model(seed=7)
    arguments = resumed(place, finished, **{"model.name_or_path": other})
    place.refused("--resume: expected the base model this run began with", arguments=arguments)


def test_resume_on_a_base_with_another_config(place, finished):
    other = place.model(rope_theta=500.0)
    arguments = resumed(place, finished, **{"model.name_or_path": other})
    place.refused("--resume: expected the base model this run began with", arguments=arguments)


@pytest.mark.parametrize(
    ("key", "value", "phrase"),
    [
        ("adapter.rank", 3, "expected adapter.rank to stay 2, got 3"),
        ("adapter.start", "lora", "expected adapter.start to stay 'pissa', got 'lora'"),
        ("regularizers.spectral", 0.5, "expected regularizers.spectral to stay 0.05, got 0.5"),
        ("training.learning_rate", 0.5, "training.learning_rate to stay 0.05, got 0.5"),
        ("training.seed", 1, "expected training.seed to stay 42, got 1"),
        ("training.max_steps", 8, "expected training.max_steps to stay 4, got 8"),
        ("training.max_steps", 3, "expected training.max_steps to stay 4, got 3"),
        ("training.batch_size", 16, "expected training.batch_size to stay 8, got 16"),
        ("data.packing", "true", "expected data.packing to stay 'batch', got 'rows'"),
        ("data.packing", "none", "expected data.packing to stay 'batch', got 'none'"),
    ],
)
def test_resume_with_another_config(place, finished, key, value, phrase):
    place.refused(phrase, arguments=resumed(place, finished, **{key: value}))


def test_resume_with_other_rows_in_the_same_file(tmp_path):
    inputs = write_inputs(tmp_path / "inputs")
    config = write_config(tmp_path / "c.yaml", inputs, training={"stop_at": 2})
    workdir = tmp_path / "run"
    assert invoke("train", config, "--workdir", workdir).code == 0
    write_rows(inputs / "train.jsonl", sums(24, seed=9))
    before = tree_digest(tmp_path)
    code, _, err = invoke("train", config, "--workdir", workdir, "--resume")
    assert code == 2
    assert "data position: expected examples" in err.splitlines()[-1]
    assert tree_digest(tmp_path) == before


# The other commands.


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_export_without_an_adapter(place, format):
    out = place.folder / "new"
    arguments = [
        "export", place.config(), "--workdir", place.workdir, "--format", format, "--out", out
    ]  # fmt: skip
    place.refused("expected the folder of a finished run with adapter/ in it", arguments=arguments)


@pytest.mark.parametrize(
    ("more", "phrase"),
    [
        (["--rank", "0"], "rank: expected at least 1, got 0"),
        (
            ["--rank", "1", "--format", "merged"],
            "--rank: expected --format peft or gguf, got merged",
        ),
        (["--dtype", "float16"], "--dtype: expected --format merged or gguf, got peft"),
        (["--format", "gguf", "--dtype", "bfloat16"], "--dtype: expected float32 or float16 with"),
    ],
)
def test_export_with_options_that_do_not_fit(place, finished, more, phrase):
    arguments = ["export", finished.config, "--workdir", finished.workdir]
    place.refused(phrase, arguments=[*arguments, "--out", place.folder / "new", *more])


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_export_to_a_link_to_nothing(place, finished, format):
    out = place.folder / "new"
    out.symlink_to("gone")
    arguments = [
        "export", finished.config, "--workdir", finished.workdir, "--format", format, "--out", out
    ]  # fmt: skip
    place.refused("expected a folder to write to, got a link to nothing", arguments=arguments)


@pytest.mark.parametrize("command", ["study", "export"])
@pytest.mark.parametrize(
    ("name", "reason"), [("", "empty text"), (" ", "empty text"), ("x" * 300, "File name too long")]
)
def test_a_folder_that_cannot_be(place, command, name, reason):
    config = place.config(study={"variants": {"a": {}}})
    more = ["--out", place.folder / "new"] if command == "export" else []
    place.refused(
        f"--workdir {name}: expected a folder, got {reason}. Name another.",
        arguments=[command, config, "--workdir", name, *more],
    )


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_export_over_something_else(place, finished, format):
    (place.folder / "full").mkdir()
    (place.folder / "full" / "thesis.txt").write_text("mine")
    arguments = [
        "export", finished.config, "--workdir", finished.workdir, "--format", format,
        "--out", place.folder / "full",
    ]  # fmt: skip
    place.refused("expected a new or empty folder, got one with other files", arguments=arguments)


@pytest.mark.parametrize("command", ["eval", "generate", "export"])
@pytest.mark.parametrize("target", ["file/x.json", "missing/x.json", "out"])
def test_figures_that_cannot_be_written(place, finished, command, target):
    (place.folder / "file").write_text("")
    figures = place.folder / target
    arguments = {
        "eval": [],
        "generate": ["--prompt", "1+1"],
        "export": ["--workdir", finished.workdir, "--out", place.folder / "new"],
    }[command]
    place.refused(
        f"--json {figures}: expected a file that can be written",
        arguments=[command, finished.config, *arguments, "--json", figures],
    )


@pytest.mark.parametrize("command", ["plan", "bench", "study"])
@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("x.xyz", "expected a name that ends in .png, got another. Choose another."),
        ("gone/x.png", "expected a file that can be written, got No such file or directory."),
        ("x" * 300 + ".png", "expected a file that can be written, got File name too long."),
        ("out.png", "expected a file that can be written, got Is a directory."),
        (
            "loop.png",
            "before, got a link, a pipe or a device, which would be lost. Choose another.",
        ),
        ("mine.png", "before, got another file, which would be lost. Choose another."),
    ],
)
def test_pictures_that_cannot_be_drawn(place, command, name, phrase):
    """Before the work: the step would be compiled, or the runs done, for nothing."""
    (place.folder / "out.png").mkdir()
    (place.folder / "loop.png").symlink_to("loop.png")
    (place.folder / "mine.png").write_text("mine")
    config = place.config(study={"variants": {"a": {}}})
    more = ["--workdir", place.workdir] if command == "study" else []
    arguments = [command, config, *more, "--picture", place.folder / name]
    place.refused("--picture ", phrase, arguments=arguments)


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["--"], "the following arguments are required: COMMAND. See balora --help."),
        (["trian"], "argument COMMAND: invalid choice: 'trian'"),
        (["train", "c.yaml"], "required: --workdir. See balora train --help."),
        (["bench", "c.yaml", "--rounds", "x"], "argument --rounds: invalid int value: 'x'. See"),
        (["eval", "c.yaml", "--adaptor", "x"], "unrecognized arguments: --adaptor x. See balora"),
    ],
)
def test_a_command_line_that_is_none(place, arguments, phrase):
    place.refused(phrase, arguments=arguments)


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_no_adapter_there(place, command):
    more = ["--prompt", "1+1"] if command == "generate" else []
    config = place.config(eval={"task": "exact_match"})
    arguments = [command, config, "--adapter", place.folder / "no", *more]
    place.refused(
        "expected a PEFT adapter folder with adapter_config.json, got none", arguments=arguments
    )


def test_eval_without_a_task(place):
    """The rows are there, so the sentence must not ask for them."""
    place.refused("eval.task: expected", "got 'none'", arguments=["eval", place.config()])


def test_eval_without_rows(place):
    place.refused(
        "data.validation: expected rows to score, got none",
        arguments=["eval", place.config(eval={"task": "exact_match"})],
        overrides={"data.validation": "null"},
    )


def test_a_process_of_its_own_says_one_line(place, process_environment):
    """The command as a person runs it: what libraries say while they load must not be there."""
    arguments = ["--workdir", place.workdir, "--set", "data.response_column=anser"]
    found = subprocess.run(
        [sys.executable, ROOT / "train.py", place.config(), *arguments],
        env=process_environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 2
    assert found.stdout == ""
    assert len(found.stderr.splitlines()) == 1, found.stderr
    assert found.stderr.startswith("balora: row 1: expected a column 'anser'")
    assert not place.workdir.exists()


@pytest.mark.parametrize("variable", ["JAX_ENABLE_X64=maybe", "JAX_PLATFORMS=rocm"])
def test_a_jax_that_does_not_start(place, process_environment, variable):
    name, text = variable.split("=")
    found = subprocess.run(
        [sys.executable, ROOT / "train.py", place.config(), "--workdir", place.workdir],
        env={**process_environment, name: text}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("balora: JAX: expected it to start here, got: ")
    assert len(found.stderr.splitlines()) == 1
    assert f"{name}={text!r}" in found.stderr
    assert not place.workdir.exists()
