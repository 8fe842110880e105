"""Time and memory of reading, on a small file."""

import json

from balora_jax.figures import read_rows


def test_both_readers_read_the_same(tmp_path, capsys):
    read_rows.main(["--rows", "3000", "--rounds", "1", "--json", str(tmp_path / "found.json")])
    first, header, *rows = capsys.readouterr().out.splitlines()
    assert 2 < float(first.removesuffix(" MB")) < 4
    assert header.split()[:2] == ["rows", "characters"]
    assert len(rows) == 3
    found = json.loads((tmp_path / "found.json").read_text())
    ours, theirs = found["load_rows"], found["datasets"]
    assert ours["rows"] == theirs["rows"] == 3000
    assert ours["characters"] == theirs["characters"] > 2_000_000
    assert found["over datasets"]["rows"] == 1
    assert ours["load s"] > 0
    assert ours["memory MB"] < 10
    assert ours["disk MB"] == 0 < theirs["disk MB"]
