"""What a file says is what is trained: kinds of cells in every format that can hold them.

All kinds stand in one column of one file, where a reader of tables would give them one type. What
is right was written down by hand, and is what `json`, `csv` and `pyarrow` read.
"""

import csv
import datetime
import decimal
import gzip
import json
import zoneinfo
from typing import NamedTuple

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from balora_jax.data.sources import load_rows
from balora_jax.data.templates import cell_text
from balora_jax.errors import InputError

# Text that a reader might take for something else, and text that a format might break.
TEXTS = [
    *("42", "007", "-0", "+5", ".5", "4.50", "1e3", "1_000", "0x1F", "1,234.5", "１２"),
    *("9007199254740993", "12345678901234567890123", "0.1000000000000000055511151231257827"),
    *("true", "False", "yes", "null", "None", "NaN", "nan", "inf", "-Infinity", "NA", "#N/A", "-"),
    *("2024-01-05", "2024-01-05 10:00:00", "2024-01-06T11:30:00Z", "12:30", "P1D"),
    *("[1, 2]", '{"a": 1}', '"quoted"', '"', "'", 'say "hi"', "a,b;c|d", "=SUM(A1)", "\\n", "\\"),
    *(
        " 5 ",
        "end ",
        "naïve “x”",
        "日本",
        "😀 e\u0301",
        "\ufeffmark",
        "a\u2028b",
        "a\x85b",
        "nul\0",
    ),
]
# Of several lines: not in TSV, which has no quotes.
LINES = ["a\nb", "a\r\nb", "a\rb", "\n\nx", "a\tb", 'x\n"y", z\n', "\tx"]
EMPTY = ["", " ", "\u00a0"]


class Cell(NamedTuple):
    """A literal of JSON, the text that is trained, and what is said where there is none."""

    literal: str
    text: str = ""
    refused: str = ""


JSON_CELLS = [
    Cell("42", "42"),
    Cell("-0", "0"),
    Cell("-7", "-7"),
    Cell("9007199254740993", "9007199254740993"),
    Cell("12345678901234567890123", "12345678901234567890123"),
    Cell("4.5", "4.5"),
    Cell("4.50", "4.5"),
    Cell("42.0", "42.0"),
    Cell("1e3", "1000.0"),
    Cell("1e22", "1e+22"),
    Cell("0.1", "0.1"),
    Cell("1E-7", "1e-07"),
    Cell("true", "true"),
    Cell("false", "false"),
    Cell(r'"a\u00e9\ud83d\ude00\/\n"', "aé😀/\n"),
    Cell(r'"\\ud800"', "\\ud800"),
    Cell("null", refused="got an empty cell."),
    Cell("NaN", refused="got an empty cell."),
    Cell("Infinity", refused="got a number without bound."),
    Cell("-Infinity", refused="got a number without bound."),
    Cell("1e400", refused="got a number without bound."),
    Cell("[]", refused="got a list."),
    Cell("[1, 2]", refused="got a list."),
    Cell('["x"]', refused="got a list."),
    Cell("{}", refused="got a dict."),
    Cell('{"a": {"b": null}}', refused="got a dict."),
    *(Cell(json.dumps(text), text) for text in TEXTS + LINES),
    *(Cell(json.dumps(text, ensure_ascii=False), text) for text in TEXTS + LINES),
    *(Cell(json.dumps(text), refused="got an empty cell.") for text in EMPTY),
]


def said(row, where="row 1"):
    try:
        text = cell_text(row, "a", where)
    except InputError as error:
        return str(error)
    return text.lower() if isinstance(row["a"], bool) else text


def same(got, wanted):
    """Equal, of one type, NaN too."""
    return repr(got) == repr(wanted) and type(got) is type(wanted)


def packed(path, text):
    path.write_bytes(gzip.compress(text.encode()))


def written(path, text):
    path.write_bytes(text.encode())


OBJECTS = [f'{{"q": {i}, "a": {cell.literal}}}' for i, cell in enumerate(JSON_CELLS)]
JSON_FILES = {
    "lines.jsonl": lambda path: written(path, "\n".join(OBJECTS)),
    "blanks.json": lambda path: written(path, "\ufeff\n" + "\r\n \r\n".join(OBJECTS) + "\r\n"),
    "packed.jsonl.gz": lambda path: packed(path, "\n".join(OBJECTS) + "\n"),
    "array.json": lambda path: written(path, "[" + ",".join(OBJECTS) + "]"),
    "spread.json": lambda path: written(path, "\ufeff \n[\n" + "\n,\t".join(OBJECTS) + "\r\n]\n"),
    "packed.json.gz": lambda path: packed(path, "[" + ", ".join(OBJECTS) + "]"),
}


@pytest.mark.parametrize("name", JSON_FILES)
def test_cells_of_json(tmp_path, name):
    JSON_FILES[name](tmp_path / name)
    rows = load_rows(str(tmp_path / name))
    assert len(rows) == len(JSON_CELLS) > 120
    for i, (row, cell) in enumerate(zip(rows, JSON_CELLS, strict=True)):
        assert same(row, json.loads(OBJECTS[i])), cell
        assert same(row, rows[i])
        if cell.refused:
            assert cell.refused in said(row), cell
        else:
            assert said(row) == cell.text, cell


def test_every_cell_of_json_alone(tmp_path):
    """No cell depends on those beside it."""
    for cell in JSON_CELLS[:60]:
        (tmp_path / "a.jsonl").write_text(f'{{"a": {cell.literal}}}', "utf-8")
        (row,) = load_rows(str(tmp_path / "a.jsonl"))
        assert same(row["a"], json.loads(cell.literal))


CSV_CELLS = TEXTS + LINES + EMPTY
TSV_CELLS = [text for text in TEXTS + EMPTY if not set(text) & set("\t\r\n")]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_cells_of_csv(tmp_path, quoting, ending, name):
    bare = ending == "\n" and quoting == csv.QUOTE_MINIMAL  # the writer leaves "\r" without quotes
    cells = [cell for cell in CSV_CELLS if not (bare and cell == "a\rb")]
    path = tmp_path / "plain"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, quoting=quoting, lineterminator=ending)
        writer.writerows([("q", "a"), *enumerate(cells)])
    with path.open(newline="", encoding="utf-8-sig") as file:
        wanted = list(csv.DictReader(file))
    data = path.read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    rows = load_rows(str(tmp_path / name))
    assert list(rows) == wanted
    assert [rows[i] for i in range(len(rows))] == wanted
    assert [row["a"] for row in rows] == cells
    for row, text in zip(rows, cells, strict=True):
        assert said(row) == text if text not in EMPTY else "got an empty cell." in said(row)


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz"])
def test_cells_of_tsv(tmp_path, ending, name):
    text = f"q\ta{ending}" + "".join(f"{i}\t{cell}{ending}" for i, cell in enumerate(TSV_CELLS))
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    rows = load_rows(str(tmp_path / name))
    assert len(rows) == len(TSV_CELLS) > 40
    assert [row["a"] for row in rows] == TSV_CELLS
    for row in rows:
        assert said(row) == row["a"] if row["a"] not in EMPTY else "got an empty cell" in said(row)


DAY, MOMENT = datetime.date(2024, 1, 5), datetime.datetime(2024, 1, 5, 10, 0, 0, 7)
# Type, cell, and the text that is trained or what is said.
ARROW_CELLS = [
    *((kind, 100, "100") for kind in (pa.int8(), pa.int16(), pa.int32(), pa.uint8(), pa.uint16())),
    (pa.int64(), 9007199254740993, "9007199254740993"),
    (pa.uint64(), 2**64 - 1, "18446744073709551615"),
    (pa.int64(), -(2**63), "-9223372036854775808"),
    (pa.float64(), 0.1, "0.1"),
    (pa.float64(), 42.0, "42.0"),
    (pa.float64(), 1e22, "1e+22"),
    (pa.float64(), float("nan"), "got an empty cell."),
    (pa.float64(), float("inf"), "got a number without bound."),
    (pa.float32(), 0.5, "0.5"),
    (pa.bool_(), True, "true"),
    (pa.bool_(), False, "false"),
    *((pa.string(), text, text) for text in TEXTS + LINES),
    *((pa.string(), text, "got an empty cell.") for text in EMPTY),
    (pa.large_string(), "007", "007"),
    (pa.dictionary(pa.int8(), pa.string()), "007", "007"),
    (pa.string(), None, "got an empty cell."),
    (pa.int64(), None, "got an empty cell."),
    (pa.float32(), None, "got an empty cell."),
    (pa.null(), None, "got an empty cell."),
    (pa.date32(), DAY, "got a date."),
    (pa.timestamp("us"), MOMENT, "got a datetime."),
    (
        pa.timestamp("us", tz="UTC"),
        MOMENT.replace(tzinfo=zoneinfo.ZoneInfo("UTC")),
        "got a datetime.",
    ),
    (pa.time64("us"), datetime.time(10, 0), "got a time."),
    (pa.duration("us"), datetime.timedelta(days=1), "got a timedelta."),
    (pa.decimal128(5, 2), decimal.Decimal("4.50"), "got a Decimal."),
    (pa.binary(), b"\xff", "got a bytes."),
    (pa.list_(pa.int64()), [1, 2], "got a list."),
    (pa.list_(pa.string()), [], "got a list."),
    (pa.struct({"a": pa.int64()}), {"a": 1}, "got a dict."),
    (pa.list_(pa.struct({"role": pa.string()})), [{"role": "user"}], "got a list."),
    (pa.map_(pa.string(), pa.int64()), [("a", 1)], "got a list."),
]


def arrow_files(folder, table):
    """The table in every format of Arrow, by name."""
    pq.write_table(table, folder / "a.parquet")
    with pa.ipc.new_file(folder / "file.arrow", table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_stream(folder / "stream.arrow", table.schema) as writer:
        writer.write_table(table)
    pa.feather.write_feather(table, str(folder / "a.feather"), compression="zstd")
    return ["a.parquet", "file.arrow", "stream.arrow", "a.feather"]


def test_cells_of_parquet_and_arrow(tmp_path):
    columns = {f"c{i}": pa.array([cell], kind) for i, (kind, cell, _) in enumerate(ARROW_CELLS)}
    for name in arrow_files(tmp_path, pa.table(columns)):
        (row,) = load_rows(str(tmp_path / name))
        assert list(row) == list(columns)
        for (kind, cell, text), (column, got) in zip(ARROW_CELLS, row.items(), strict=True):
            assert same(got, cell), (name, kind)
            assert same(got, columns[column].to_pylist()[0])
            words = said({"a": got})
            assert words == text or (text.startswith("got a") and text in words), (name, kind)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (pa.float32(), "0.1"),
        (pa.float32(), "3.8"),
        (pa.float32(), "1e-07"),
        (pa.float32(), "3.4028235e+38"),
        (pa.float16(), "0.1"),
    ],
)
def test_a_short_float_is_the_shortest_decimal_that_means_it(tmp_path, kind, text):
    """`pyarrow` would give 0.1 of 32 bits as 0.10000000149011612."""
    column = pa.array([float(text)]).cast(kind)
    for name in arrow_files(tmp_path, pa.table({"a": column})):
        (row,) = load_rows(str(tmp_path / name))
        assert said(row) == text
        assert pa.array([row["a"]]).cast(kind) == column  # the very number


def test_what_columns_were_made_of(tmp_path):
    """Faults of a reader of tables, one by one."""
    cells = {
        "whole beside broken": ["42", "4.5", "1000000"],
        "long": ["9007199254740993", "0.5"],
        "dates": ['"2024-01-05"', '"2024-01-06"'],
        "late": ["null"] * 3000 + ['"text"'],
        "text beside a list": ['["x"]', '"007"', "true"],
    }
    for title, literals in cells.items():
        path = tmp_path / f"{title}.jsonl"
        path.write_text("".join(f'{{"a": {literal}}}\n' for literal in literals))
        assert [json.dumps(row["a"]) for row in load_rows(str(path))] == literals
    path = tmp_path / "key.jsonl"
    path.write_text('{"a": 1}\n' * 3000 + '{"a": 1, "b": "new"}\n')
    assert load_rows(str(path))[3000] == {"a": 1, "b": "new"}
