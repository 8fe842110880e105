"""Sources: every kind of file, no stale cache, no network, and every refusal."""

import contextlib
import gzip
import io
import json
import socket
from pathlib import Path

import datasets
import pytest

from balora_jax.data.sources import load_rows
from balora_jax.errors import InputError

SHARED = Path(__file__).parents[2].parent / "shared"
ROWS = [{"q": "one, two", "a": "1"}, {"q": "naïve “x”", "a": "None"}, {"q": "three", "a": "007"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = 'q,a\n"one, two",1\nnaïve “x”,None\nthree,007\n'
TSV = "q\ta\none, two\t1\nnaïve “x”\tNone\nthree\t007\n"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    asked = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    # Counted here, because a library may swallow the error and go on.
    assert asked == []


def parquet(path):
    datasets.Dataset.from_list(ROWS).to_parquet(path)


WRITERS = {
    "rows.jsonl": lambda p: p.write_text(LINES, "utf-8"),
    "lines.json": lambda p: p.write_text(LINES, "utf-8"),
    "array.json": lambda p: p.write_text(json.dumps(ROWS), "utf-8"),
    "rows.jsonl.gz": lambda p: p.write_bytes(gzip.compress(LINES.encode())),
    "rows.JSON.GZ": lambda p: p.write_bytes(gzip.compress(LINES.encode())),
    "rows.csv": lambda p: p.write_text(CSV, "utf-8"),
    "bom.csv": lambda p: p.write_text("\ufeff" + CSV, "utf-8"),
    "rows.csv.gz": lambda p: p.write_bytes(gzip.compress(CSV.encode())),
    "rows.tsv": lambda p: p.write_text(TSV, "utf-8"),
    "rows.parquet": lambda p: parquet(p),
    "odd [name]*.jsonl": lambda p: p.write_text(LINES, "utf-8"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    WRITERS[name](tmp_path / name)
    assert list(load_rows(str(tmp_path / name))) == ROWS
    assert list(load_rows(str(tmp_path / name), limit=2)) == ROWS[:2]
    assert len(load_rows(str(tmp_path / name), limit=50)) == 3
    assert [p.name for p in tmp_path.iterdir()] == [name]  # nothing is written beside it


def test_an_edited_file_is_read_anew(tmp_path):
    path = tmp_path / "a.jsonl"
    for text in ("old", "new"):
        path.write_text(json.dumps({"q": text}) + "\n")
        assert load_rows(str(path))[0] == {"q": text}


def test_a_pattern_reads_files_in_sorted_order_and_the_limit_spans_them(tmp_path):
    for i in (2, 0, 1):
        (tmp_path / f"part{i}.jsonl").write_text(f'{{"n": {2 * i}}}\n{{"n": {2 * i + 1}}}\n')
    pattern = str(tmp_path / "part*.jsonl")
    assert [row["n"] for row in load_rows(pattern)] == [0, 1, 2, 3, 4, 5]
    assert [row["n"] for row in load_rows(pattern, limit=3)] == [0, 1, 2]
    assert [row["n"] for row in load_rows(pattern, limit=2)] == [0, 1]


def test_a_relative_path(tmp_path, monkeypatch):
    WRITERS["rows.jsonl"](tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    assert list(load_rows("rows.jsonl")) == ROWS


def test_a_file_in_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr("balora_jax.paths._PACKAGE_ROOT", tmp_path)
    WRITERS["rows.jsonl"](tmp_path / "rows.jsonl")
    assert list(load_rows("balora_jax:rows.jsonl")) == ROWS


def test_quotes_are_text_in_tsv(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('q\ta\n"unbalanced\t1\nx\t2\n')
    assert [row["q"] for row in load_rows(str(path))] == ['"unbalanced', "x"]


def test_cells_keep_their_types_in_json(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 5, "m": [{"role": "user", "content": "x"}]}\n')
    assert load_rows(str(path))[0] == {"a": 5, "m": [{"role": "user", "content": "x"}]}


def test_a_cell_of_json_is_as_it_stands(tmp_path):
    """A reader of tables would give a column one type, and a date its own."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "007", "b": "2020-01-31"}\n{"a": 7, "b": 1.0}\n{"c": null}\n')
    expected = [{"a": "007", "b": "2020-01-31"}, {"a": 7, "b": 1.0}, {"c": None}]
    assert list(load_rows(str(path))) == expected


@pytest.mark.parametrize("columns", ["q,a", "a,q"])
def test_a_cell_of_csv_may_be_long(tmp_path, columns):
    path = tmp_path / "a.csv"
    path.write_text(f"{columns}\n1,{'2' * 200_000}\n")
    assert len(load_rows(str(path))[0][columns[-1]]) == 200_000


@pytest.mark.parametrize("name", ["json", "csv", "json:default"])
def test_the_name_of_a_format_is_no_data_set(tmp_path, monkeypatch, name):
    """`datasets` would read every file of the working directory."""
    (tmp_path / "secret.jsonl").write_text('{"a": 1}\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=f"{name}: expected a data file or a hub data set, got the n"
    ):
        load_rows(name)


def write(path, data):
    if isinstance(data, bytes):
        path.write_bytes(data)
    else:
        path.write_text(data, "utf-8")


PACKED = gzip.compress(b"".join(b'{"a": "%d"}\n' % (i * i) for i in range(9999)))
REFUSED = {
    "empty.jsonl": ("", "expected at least one row, got an empty data set."),
    "blank.jsonl": ("\n\n", "expected at least one row, got an empty data set."),
    "empty.jsonl.gz": (gzip.compress(b""), "expected at least one row, got an empty data set."),
    "empty.csv": ("", "expected at least one row, got an empty data set."),
    "header.csv": ("a,b\n", "expected at least one row, got an empty data set."),
    "array.json": ("[]", "expected at least one row, got an empty data set."),
    "broken.jsonl": ('{"a": 1}\n{"a": oops\n', "got broken JSON (Expecting value"),
    "where.jsonl": ('{"a": 1}\n{"a": oops\n', ") in line 2. Fix that line."),
    "number.jsonl": ('{"a": 1}\n5\n', "got something else in line 2."),
    "deep.jsonl": (
        "[" * 10**5 + "\n",
        "expected an array of JSON objects, got something else at its place 1. Fix that row.",
    ),
    "deep_row.jsonl": (
        '{"a": 1}\n' + '{"a": ' * 10**5 + "}" * 10**5,
        "got broken JSON (nested too deep) in line 2. Fix that line.",
    ),
    "digits.jsonl": (
        '{"a": ' + "9" * 5000 + "}\n",
        "got broken JSON (Exceeds the limit (4300 digits)",
    ),
    "zeros.jsonl": (b"\0" * 10**5, "got broken JSON (Expecting value: line 1"),
    "half.jsonl": ('{"a": "\\ud800"}\n', "surrogates not allowed) in line 1. Fix that line."),
    "bomb.jsonl.gz": (
        gzip.compress(b'{"a": "' + bytes(2**26), 1),
        "expected one JSON object a line, got more than 64 MiB in line 1. Fix that line.",
    ),
    "mixed.json": (
        '[{"a": 1}, 5]',
        "expected an array of JSON objects, got something else at its pl",
    ),
    "broken.json": ("[{", "expected an array of JSON objects, got broken JSON (Expecting property"),
    "not.jsonl.gz": ("text", "expected a whole gzip file, got a damaged one (Not a gzipped file"),
    "cut.jsonl.gz": (PACKED[: len(PACKED) // 2], "expected a whole gzip file, got a damaged one"),
    "hurt.jsonl.gz": (
        PACKED[:500] + b"\xff" * 300 + PACKED[800:],
        "expected a whole gzip file, got a damaged one",
    ),
    "latin.jsonl": (
        b'{"a": "\xe9"}\n',
        "got what is not UTF-8 (invalid continuation byte) in line 1. Fix that line.",
    ),
    "long.csv": (
        "a,b\n1,2\n1,2,3\n",
        "expected 2 cells in a row, as in the header, got 3 in line 3.",
    ),
    "short.csv": ("a,b\n\n1\n", "expected 2 cells in a row, as in the header, got 1 in line 3."),
    "open.csv": (
        'a,b\n1,"2\n3,4\n',
        "expected rows of ',' between cells, got one that is broken (unexpected end of data) and that "
        "ends in line 3. Fix its quotes.",
    ),
    "stray.csv": (
        'a,b\n1,"2"3\n',
        "that is broken (',' expected after '\"') and that ends in line 2.",
    ),
    "latin.csv": (
        b"a\n\xe9\n",
        "got b'\\xe9\\n', which is not UTF-8, in line 2. Fix that line, or sav",
    ),
    "utf16.csv": (
        "a\n1\n".encode("utf-16"),
        "which is not UTF-8, in line 1. Fix that line, or save",
    ),
    "wider.csv": (
        "a,b\n1,2,3\n",
        "expected 2 cells in a row, as in the header, got 3 in line 2.",
    ),
    "twice.csv": ("a,a\n1,2\n", "expected each column once, got a, a."),
    "other.json": (
        '[{"a": 1}; {}]',
        "got broken JSON (no comma after the object before it) at its pl",
    ),
    "comma.json": ('[{"a": 1},]', "got something else at its place 2. Fix that row."),
    "cut.json": ('[{"a": 1},', "got the end of the file at its place 2. Fix that row."),
    "open.json": (
        '[{"a": 1}',
        "got broken JSON (no comma after the object before it) at its place",
    ),
    "more.json": (
        '[{"a": 1}]\n[]',
        "got broken JSON (more text after the end of the array) at its",
    ),
    "latin.json": (
        b'[{"a": "\xe9"}]',
        "got what is not UTF-8 (invalid continuation byte) at its place 1.",
    ),
    "half.json": ('[{"a": "\\ud800"}]', "surrogates not allowed) at its place 1. Fix that row."),
    "deep.json": (
        '[{"a": ' + "[" * 10**5,
        "got broken JSON (nested too deep) at its place 1. Fix that row.",
    ),
    "twins.jsonl": (
        '{"a": 1, "a": 2}\n',
        "broken JSON (the key 'a' twice, with two values) in line 1.",
    ),
    "twins.json": (
        '[{"a": 1, "a": 2}]',
        "JSON (the key 'a' twice, with two values) at its place 1.",
    ),
    "no.parquet": ("text", "expected a readable data file, got an error ("),
    "notes.txt": ("text", "expected JSON lines (.jsonl, .json), CSV, TSV, parquet or Arrow"),
    "packed.parquet.gz": (
        "text",
        "expected JSON lines (.jsonl, .json), CSV, TSV, parquet or Arrow",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_files_are_refused_in_one_sentence(tmp_path, name, capfd):
    data, message = REFUSED[name]
    write(tmp_path / name, data)
    with pytest.raises(InputError) as error:
        load_rows(str(tmp_path / name))
    assert str(error.value).startswith(str(tmp_path / name))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""  # the sentence is all that a user reads


@pytest.mark.parametrize("spec", ["missing.jsonl", "./missing", "part*.jsonl", "a/b/c", "~/no.csv"])
def test_missing_files_are_refused(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"expected a data file, found none\. Check the path\."):
        load_rows(spec)


def test_a_folder_mixed_kinds_and_other_columns_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    (tmp_path / "b.csv").write_text("y,x\n1,2\n")
    (tmp_path / "c.jsonl").write_text('{"x": 1}\n')
    with pytest.raises(InputError, match="expected a data file, got a folder"):
        load_rows(str(tmp_path))
    with pytest.raises(InputError, match="expected files of one kind, got several"):
        load_rows(str(tmp_path / "*"))
    with pytest.raises(InputError, match=r"b\.csv: expected the columns of .*a\.csv, got y, x\."):
        load_rows(str(tmp_path / "*.csv"))


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit):
    with pytest.raises(InputError, match=f"expected a limit of at least 1 row, got {limit}"):
        load_rows("x.jsonl", limit=limit)


class Hub:
    """Stands in for the hub: keeps what it was asked for."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def __call__(self, *args, **kwargs):
        self.asked.append((args, kwargs))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def hub(monkeypatch, answer):
    stand_in = Hub(answer)
    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    return stand_in


@pytest.mark.parametrize("terminal", [False, True])
def test_bars_of_the_hub_are_for_terminals(monkeypatch, terminal):
    class Stream(io.StringIO):
        def isatty(self):
            return terminal

    def download(*_, **__):
        with datasets.utils.tqdm(total=1, desc="download") as bar:
            bar.update()
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", download)
    with contextlib.redirect_stderr(Stream()) as stream:
        load_rows("imdb", split="test")
    assert ("download: 100%" in stream.getvalue()) == terminal
    assert not datasets.are_progress_bars_disabled()


@pytest.mark.parametrize(
    ("spec", "asked"),
    [
        ("openai/gsm8k:main", ("openai/gsm8k", "main")),
        ("glue:cola", ("glue", "cola")),
        ("imdb", ("imdb", None)),
    ],
)
def test_hub_names(monkeypatch, spec, asked):
    stand_in = hub(monkeypatch, datasets.Dataset.from_list(ROWS))
    assert list(load_rows(spec, split="test")) == ROWS
    assert list(load_rows(spec, split="test", limit=2)) == ROWS[:2]
    assert len(load_rows(spec, split="test", limit=99)) == 3
    assert stand_in.asked == [(asked, {"split": "test"})] * 3  # and nothing that trusts its code


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach it"),
        ValueError("Unknown split"),
        datasets.exceptions.DatasetNotFoundError("doesn't exist"),
        datasets.exceptions.DatasetGenerationError("broken"),
    ],
)
def test_hub_failures_are_refused(monkeypatch, error):
    hub(monkeypatch, error)
    with pytest.raises(InputError) as refused:
        load_rows("org/name", split="dev")
    assert str(refused.value) == (
        "org/name: expected a data file or a hub data set with the split 'dev', got neither "
        f"({error}). Check the name, the split and the network."
    )


def test_a_hub_name_without_a_single_split_is_refused(monkeypatch):
    hub(monkeypatch, datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}))
    with pytest.raises(InputError, match="org/name: expected one split, got 'all'"):
        load_rows("org/name", split="all")


@pytest.mark.parametrize(
    ("file", "count", "column"),
    [
        ("math/gsm8k_test.jsonl.gz", 1319, "question"),
        ("bias/crows_pairs.csv.gz", 1508, "sent_more"),
        ("bias/winogender_sentences.tsv", 720, "sentence"),
        ("instruct/evol_instruct_sample.jsonl.gz", 16, "conversations"),
        ("math/svamp.jsonl.gz", 1000, "Body"),
    ],
)
def test_real_files(file, count, column):
    path = SHARED / "data" / file
    if not path.is_file():
        pytest.skip("the shared folder is not there")
    rows = load_rows(str(path))
    assert len(rows) == count
    assert all(row[column] for row in rows)
