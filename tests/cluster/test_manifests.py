"""Files of configs/cluster: what their schemas say of them, and that they start what there is."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from balora_jax import cli
from balora_jax.config_file import load_config
from balora_jax.parallel import launch
from tests.cluster.jobset import CONFIGS, JobSet

ROOT = CONFIGS.parents[1]
JOBSETS = ("jobset_tpu.yaml", "jobset_gpu.yaml")
WAITS = launch.Timeouts()


def missing(ours, theirs, where=""):
    """Places of ours that a schema's model does not give back as they are."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key, value in ours.items():
            yield from missing(value, theirs.get(key), f"{where}.{key}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from missing(*pair, f"{where}[{i}]")
    elif ours != theirs:
        yield f"{where}: {ours!r}, not {theirs!r}"


@pytest.mark.parametrize("name", JOBSETS)
def test_a_jobset_is_one_by_the_published_models(name):
    models = pytest.importorskip("kubeflow_trainer_api.models")
    tree = yaml.safe_load((CONFIGS / name).read_text())
    read = models.JobsetV1alpha2JobSet.from_dict(tree)
    assert list(missing(tree, read.to_dict())) == []


def test_a_wrong_key_would_be_seen():
    models = pytest.importorskip("kubeflow_trainer_api.models")
    tree = yaml.safe_load((CONFIGS / JOBSETS[0]).read_text())
    tree["spec"]["replicatedJobs"][0]["template"]["spec"]["backofLimit"] = 0
    read = models.JobsetV1alpha2JobSet.from_dict(tree)
    assert list(missing(tree, read.to_dict())) == [
        ".spec.replicatedJobs[0].template.spec.backofLimit: 0, not None"
    ]


@pytest.mark.parametrize("name", JOBSETS)
def test_what_the_policies_need_is_set(name):
    """Kubernetes takes a policy on exit codes only of pods that it does not restart itself."""
    found = JobSet(name)
    assert found.pod["restartPolicy"] == "Never"
    assert found.job["completionMode"] == "Indexed"
    assert found.job["parallelism"] == found.job["completions"]
    assert all(re.fullmatch("[A-Za-z]+", rule["name"]) for rule in found.policy["rules"])
    limits, requests = (found.container["resources"][kind] for kind in ("limits", "requests"))
    assert limits == requests
    mounted = {mount["name"] for mount in found.container.get("volumeMounts", [])}
    assert mounted == {volume["name"] for volume in found.pod.get("volumes", [])}
    assert "command" not in found.container  # the image's own is process 1, and gets the signals


@pytest.mark.parametrize("name", JOBSETS)
def test_the_arguments_are_a_command(name):
    options = cli.make_parser().parse_args(JobSet(name).arguments(process=1))
    assert options.resume
    load_config(ROOT / options.config, options.set)


def test_pods_with_gpus_find_each_other_by_their_arguments():
    found = JobSet("jobset_gpu.yaml")
    options = cli.make_parser().parse_args(found.arguments(process=1))
    given = (options.coordinator, options.processes, options.process)
    assert launch.start_of(*given, WAITS, {}) == launch.Start(*given, WAITS)
    assert options.processes == found.job["parallelism"]
    set_name = found.tree["metadata"]["name"]
    host, _, port = options.coordinator.partition(":")
    assert host == f"{set_name}-{found.name}-0-0.{set_name}"
    assert {"containerPort": int(port)} in found.container["ports"]


def test_the_hosts_of_a_slice_find_each_other_by_what_gke_tells_them():
    found = JobSet("jobset_tpu.yaml")
    options = cli.make_parser().parse_args(found.arguments(process=1))
    assert options.coordinator is None
    told = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a.b,c.b,d.b,e.b"}
    assert launch.start_of(None, None, None, WAITS, told) is not None
    rows, columns = map(
        int, found.pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    )
    chips = found.container["resources"]["limits"]["google.com/tpu"]
    assert rows * columns == chips * found.job["parallelism"]


def test_extras_of_the_image_exist():
    known = (ROOT / "pyproject.toml").read_text()
    text = "".join((CONFIGS / name).read_text() for name in ("Dockerfile", "skypilot.yaml"))
    named = {part for found in re.findall(r'"\.\[(.*?)\]"', text) for part in found.split(",")}
    for extra in (named - {"${EXTRAS}"}) | {"tpu", "cuda"}:
        assert re.search(rf"^{extra} = \[", known, re.MULTILINE), extra


def test_what_the_image_copies_is_there():
    copied = re.findall(r"^COPY (.+) \S+$", (CONFIGS / "Dockerfile").read_text(), re.MULTILINE)
    assert all((ROOT / name).exists() for line in copied for name in line.split())


def test_skypilot_runs_a_command_of_ours():
    tree = yaml.safe_load((CONFIGS / "skypilot.yaml").read_text())
    assert tree["resources"]["job_recovery"]["recover_on_exit_codes"] == [3]
    given = {
        "$CONFIG": tree["envs"]["CONFIG"],
        "$SKYPILOT_NUM_NODES": "2",
        "$SKYPILOT_NODE_RANK": "1",
    }
    line = tree["run"].replace("\\\n", " ").partition("bin/balora ")[2].replace('"', "").split()
    options = cli.make_parser().parse_args([given.get(word, word) for word in line])
    assert (options.resume, options.processes, options.process) == (True, 2, 1)
    load_config(ROOT / options.config)


@pytest.mark.parametrize("text", ["setup", "run"])
def test_scripts_of_skypilot_are_scripts(text, tmp_path):
    script = tmp_path / "script"
    script.write_text(yaml.safe_load((CONFIGS / "skypilot.yaml").read_text())[text])
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


SCRIPT = CONFIGS / "slurm.sbatch"


def test_the_batch_script_is_a_script():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    lint = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if lint is not None:
        done = subprocess.run([lint, SCRIPT], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


STANDS_IN = {
    # A run that saves at SIGTERM, as ours does; what it was called with is noted.
    "srun": 'echo "$@" > "$NOTES/srun"\ntrap "sleep 0.1; exit $CODE" TERM\n'
    'touch "$NOTES/up"\n[ -n "${AT_ONCE:-}" ] && exit "$CODE"\nwhile :; do sleep 0.02; done\n',
    "scontrol": 'echo "$@" >> "$NOTES/scontrol"\n',
}


@pytest.fixture
def batch(tmp_path):
    """Starts the batch script among stand-ins of SLURM's commands, which leave notes."""
    for name, text in STANDS_IN.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "notes").mkdir()
    path = f"{tmp_path}:{os.environ['PATH']}"

    def start(**environment):
        given = {"PATH": path, "NOTES": str(tmp_path / "notes"), "SLURM_JOB_ID": "7", **environment}
        command = ["bash", SCRIPT, "c.yaml", "--workdir", "w"]
        return subprocess.Popen(command, env=given, stdout=subprocess.DEVNULL)

    return start


@pytest.mark.parametrize(
    ("code", "before", "queued"),
    [("3", "0", True), ("3", "20", False), ("2", "0", False), ("0", "0", False)],
)
def test_only_code_3_is_queued_again_and_not_for_ever(batch, tmp_path, code, before, queued):
    run = batch(CODE=code, AT_ONCE="yes", SLURM_RESTART_COUNT=before)
    assert run.wait(10) == int(code)
    assert (tmp_path / "notes" / "srun").read_text() == (
        "--kill-on-bad-exit=0 balora train c.yaml --workdir w --resume\n"
    )
    assert (tmp_path / "notes" / "scontrol").exists() is queued
    if queued:
        assert (tmp_path / "notes" / "scontrol").read_text() == "requeue 7\n"


@pytest.mark.parametrize(
    "signals", [[signal.SIGUSR1], [signal.SIGUSR1] * 2, [signal.SIGTERM, signal.SIGUSR1]]
)
def test_the_end_of_the_allowed_time_reaches_the_run_once(batch, tmp_path, signals):
    run = batch(CODE="3")
    while not (tmp_path / "notes" / "up").exists():
        time.sleep(0.01)
    for number in signals:
        run.send_signal(number)
        time.sleep(0.02)
    assert run.wait(10) == 3
    assert (tmp_path / "notes" / "scontrol").read_text() == "requeue 7\n"
