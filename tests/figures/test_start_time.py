"""The time of a start by kind of layer."""

from pathlib import Path

from balora_jax.figures import start_time

CONFIG = Path(__file__).resolve().parents[2] / "configs/bench_llama_512x8.yaml"


def test_every_kind_of_layer_has_its_line(capsys):
    options = [
        "model.name_or_path=balora_jax:bench/shapes/llama_256x4",
        "adapter.start=pissa_niter_1",
        "adapter.rank=2",
        "adapter.target_modules=[up_proj]",
    ]
    start_time.main([str(CONFIG), "--layers", "2", "--set", *options])
    header, *rows, last = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "layer"
    found = {row.split()[0]: row.split()[1:] for row in rows}
    assert list(found) == ["mlp.up_proj"]
    for count, *shape, first, later in found.values():
        assert count == "2"
        assert shape[0] == "256"
        assert float(first) > float(later) > 0
    assert last.startswith("start pissa_niter_1: ")
