"""Files of rows: they stay where they are, in bounded memory, and may not change under a run."""

import gzip
import json
import os
import random
import resource
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from balora_jax.data import json_rows, text_rows
from balora_jax.data.sources import load_rows
from balora_jax.errors import InputError

ROOT = Path(__file__).parents[2]


def rows_of(count, seed=0):
    draw = random.Random(seed)
    words = ["naïve", "日本", "a\nb", '"', "\\", "x" * 50, "}", "]", ",", "{"]
    return [
        {"n": n, "q": " ".join(draw.choices(words, k=draw.randrange(9))), "a": [{"b": n}] * (n % 3)}
        for n in range(count)
    ]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def write_packed(path, rows):
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def write_array(path, rows):
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), "utf-8")


def write_csv(path, rows):
    cells = ['"{}"'.format(row["q"].replace('"', '""')) for row in rows]
    text = "n,q\n" + "".join(f"{row['n']},{cell}\n" for row, cell in zip(rows, cells, strict=True))
    path.write_text(text, "utf-8")


def write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=700)


def write_stream(path, rows):
    with pa.ipc.new_stream(path, (table := pa.Table.from_pylist(rows)).schema) as writer:
        writer.write_table(table, max_chunksize=900)


def write_arrow(path, rows):
    with pa.ipc.new_file(path, (table := pa.Table.from_pylist(rows)).schema) as writer:
        writer.write_table(table, max_chunksize=950)


WRITERS = {
    "a.jsonl": write_lines,
    "a.jsonl.gz": write_packed,
    "a.json": write_array,
    "a.csv": write_csv,
    "a.parquet": write_parquet,
    "a.arrow": write_stream,
    "b.arrow": write_arrow,
}


def wanted(name, rows):
    return [{"n": str(row["n"]), "q": row["q"]} for row in rows] if name == "a.csv" else rows


@pytest.mark.parametrize("name", WRITERS)
def test_rows_by_their_place(tmp_path, name, monkeypatch):
    monkeypatch.setattr(json_rows, "_PIECE", 100)  # rows that do not fit, again and again
    rows = rows_of(2500)
    WRITERS[name](tmp_path / name, rows)
    found, right = load_rows(str(tmp_path / name)), wanted(name, rows)
    assert len(found) == 2500
    assert list(found) == right
    for part in (range(10), range(1990, 2010), range(690, 710), range(2499, -1, -313)):
        assert [found[i] for i in part] == [right[i] for i in part]
    pairs = zip(found, found, strict=True)  # two readers of one file
    assert all(one == other for one, other in pairs)
    assert found[-1] == right[-1]
    for index in (2500, -2501):
        with pytest.raises(IndexError):
            found[index]
    limited = load_rows(str(tmp_path / name), limit=1001)
    assert (len(limited), list(limited)) == (1001, right[:1001])


@pytest.mark.parametrize("name", WRITERS)
def test_rows_of_several_files(tmp_path, name):
    """More files than a process may hold open."""
    rows = [rows_of(n % 3, seed=n) for n in range(300)]
    for number, part in enumerate(rows):
        if part or not name.endswith(("parquet", "arrow")):  # else there is no type
            WRITERS[name](tmp_path / f"{number:03}{name}", part)
    right = wanted(name, [row for part in rows for row in part])
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (held + 40, before[1]))
    try:
        found = load_rows(str(tmp_path / f"*{name}"))
        assert list(found) == right
        assert [found[i] for i in range(len(found))] == right
        assert found[-1] == right[-1]
        assert found[0] == right[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def grow(path):
    with path.open("ab") as file:
        file.write(b"\n")


def touch(path):
    os.utime(path, ns=(1, 1))


def replace(path):
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    touch(other)
    other.replace(path)


@pytest.mark.parametrize("change", [grow, touch, replace, Path.unlink])
@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_changes_is_refused(tmp_path, name, change):
    WRITERS[name](tmp_path / name, rows_of(5))
    rows = load_rows(str(tmp_path / name))
    change(tmp_path / name)
    said = "No such file" if change is Path.unlink else "expected a data file that stays as it is"
    with pytest.raises(InputError, match=said):
        rows[3]
    with pytest.raises(InputError, match=said):
        list(rows)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_file_that_is_written_to_while_it_is_read_is_refused(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path, rows_of(5))
    found = iter(load_rows(str(path)))
    next(found)
    grow(path)
    with pytest.raises(InputError, match=r"got another size or time of change\. Start again once"):
        next(found)


def test_a_file_that_is_written_to_while_it_is_checked_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    write_lines(path, rows_of(5))
    check = json_rows._check_line
    monkeypatch.setattr(json_rows, "_check_line", lambda *a: (check(*a), touch(path)))
    with pytest.raises(InputError, match="expected a data file that stays as it is while it is"):
        load_rows(str(path))


@pytest.mark.parametrize("name", WRITERS)
def test_memory_does_not_grow_with_the_rows(tmp_path, name):
    """8 MB of rows: a line at a time, a MiB of an array, a thousand rows of a table."""
    pieces = name in ("a.json", "a.parquet", "a.arrow", "b.arrow")
    count = 4000 if name.endswith(("parquet", "arrow")) else 1000
    rows = [{"n": n, "q": f"{n} " + "x" * (8_000_000 // count), "a": None} for n in range(count)]
    WRITERS[name](tmp_path / name, rows)
    del rows
    tracemalloc.start()
    try:
        assert sum(1 for _ in load_rows(str(tmp_path / name))) == count
        assert tracemalloc.get_traced_memory()[1] < (4.5e6 if pieces else 0.3e6)
    finally:
        tracemalloc.stop()


def test_local_files_need_no_cache_and_no_network(tmp_path):
    """`datasets`, which makes folders and asks the network, is not even loaded."""
    for name in WRITERS:
        WRITERS[name](tmp_path / name, rows_of(3))
    (tmp_path / "file").write_text("no folder")
    code = (
        "import sys; from balora_jax.data.sources import load_rows\n"
        "for name in sys.argv[1:]: assert len(load_rows(name)) == 3\n"
        "assert 'datasets' not in sys.modules"
    )
    nowhere = str(tmp_path / "file" / "below")
    environment = {**os.environ, "HF_HOME": nowhere, "HOME": nowhere, "TMPDIR": nowhere}
    environment["HF_DATASETS_CACHE"] = nowhere
    names = [str(tmp_path / name) for name in WRITERS]
    done = subprocess.run(
        [sys.executable, "-c", code, *names],
        env=environment,
        cwd=ROOT,
        check=False,
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_an_object_of_an_array_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "MOST_OF_A_ROW", 2**21)
    (tmp_path / "a.json").write_text('[{"a": "' + "x" * 2**22 + '"}]')
    with pytest.raises(InputError, match=r"or an object of more than 2 MiB\) at its place 1"):
        load_rows(str(tmp_path / "a.json"))


def test_long_work_is_shown(tmp_path, monkeypatch, capfd):
    write_lines(tmp_path / "a.jsonl", rows_of(5))
    load_rows(str(tmp_path / "a.jsonl"))
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(text_rows, "_SHOW_PROGRESS_ABOVE", 10)
    load_rows(str(tmp_path / "a.jsonl"))
    assert "reading a.jsonl: 0.00 of" in capfd.readouterr().err


def test_a_column_that_stands_twice_is_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    write_twice = pa.ipc.new_file(tmp_path / "a.arrow", table.schema)
    with write_twice as writer:
        writer.write_table(table)
    with pytest.raises(InputError, match=r"a\.arrow: expected each column once, got a, a\. Rename"):
        load_rows(str(tmp_path / "a.arrow"))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "b.arrow"])
@pytest.mark.parametrize("at", [0.02, 0.3, 0.6, 0.99])
def test_a_damaged_file_of_arrow_is_one_sentence(tmp_path, name, at):
    rows = [{"n": n, "q": f"{n * n} naïve"} for n in range(2000)]
    WRITERS[name](tmp_path / name, rows)
    data = bytearray((tmp_path / name).read_bytes())
    for cut in (data[: int(at * len(data))], data[: int(at * len(data))] + b"\xff" * 64):
        (tmp_path / name).write_bytes(cut)
        with pytest.raises(InputError) as error:
            list(load_rows(str(tmp_path / name)))
        assert str(error.value).startswith(str(tmp_path / name))
        assert "\n" not in str(error.value)
