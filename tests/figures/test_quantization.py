"""The table of a quantised base from shapes alone."""

from pathlib import Path

import pytest

from balora_jax.figures import quantization

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def rows_of(capsys, name):
    quantization.main([str(CONFIGS / name)])
    header, *rows = capsys.readouterr().out.splitlines()
    assert "a device" in header
    return {row.split()[0]: row.split()[1:] for row in rows}


def test_bytes_of_llama2_7b_are_those_counted_by_hand(capsys):
    found = rows_of(capsys, "bench_llama2_7b.yaml")
    width, inner, layers, vocabulary = 4096, 11008, 32, 32000
    linear = layers * (4 * width**2 + 3 * width * inner)
    rest = 2 * (2 * vocabulary * width + (2 * layers + 1) * width)  # bfloat16
    scales = 4 * layers * (4 * width + 2 * inner + width)  # of int8, one an output
    want = {
        "bfloat16": rest + 2 * linear,
        "int8": rest + linear + scales,
        "nf4": rest + linear / 2 + 2 * linear / 64,
    }
    assert list(found) == list(want)
    for kind, size in want.items():
        whole, device = map(float, found[kind])
        assert whole == device == pytest.approx(size / 2**30, abs=6e-4), kind


def test_a_width_that_nf4_cannot_hold_is_said_in_its_line(capsys):
    found = rows_of(capsys, "bench_llama_512x8.yaml")
    assert "got 1376 for layers.mlp.down_proj.kernel" in " ".join(found["nf4"])
