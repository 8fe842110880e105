"""Loading, starts and the head's factor: eight devices and two processes against one device."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, "-m", "tests.run.start_program"]
STARTS = ("pissa_niter_4", "pissa")
MESHES = ("fsdp 8", "tensor 2 x fsdp 4")


def begun(*arguments):
    return subprocess.Popen(
        [*PROGRAM, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-4000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("starts")


@pytest.fixture(scope="module")
def found(folder):
    return ended(begun(str(folder)))


@pytest.fixture(scope="module")
def processes(folder, found):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = [begun(str(folder), number, port) for number in "01"]
    return [ended(process) for process in both]


CASES = [
    *(f"{start} / {mesh}" for start in STARTS for mesh in MESHES),
    *(f"{start} / {MESHES[1]}" for start in ("lora", "olora", "orthogonal")),
]


@pytest.mark.parametrize("case", CASES)
def test_eight_devices_begin_where_one_does(found, case):
    figures = found[case]
    assert figures["frozen"]
    assert figures["elsewhere"] == []
    # Float32 sums in another order; even the signs of the vectors are the same.
    assert figures["factors"] < 2e-5
    assert figures["products"] < 2e-5
    assert figures["head"] < 1e-6


@pytest.mark.parametrize("mesh", MESHES)
def test_a_sketch_gathers_thin_products_and_never_the_weight(found, mesh):
    gathered = found[f"gathered / {mesh}"]
    # [512, 4] of [256, 512]; that the measure sees a gathered weight is shown by the exact start.
    assert gathered["pissa_niter_4"] <= 512 * 4 / (256 * 512)
    assert gathered["pissa"] == 1.0


@pytest.mark.parametrize("start", STARTS)
def test_two_processes_begin_where_one_does(processes, start):
    for figures in processes:
        differences = dict(figures[start])
        assert differences.pop("blocks") > len(differences)
        assert {"head_factor", "origin layers.mlp.down_proj.origin_norm"} <= set(differences)
        assert max(differences.values()) < 1e-5
        exact = ("embedding", "kernel", "lora_scale")
        assert not any(v for path, v in differences.items() if path.endswith(exact))
