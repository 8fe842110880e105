"""Labels in every format: the class that is trained is the one that the file names."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from balora_jax.config_file import parse_config
from balora_jax.data import hub
from balora_jax.data.glue import GLUE, custom_task, label_of
from balora_jax.data.sources import load_rows
from balora_jax.errors import InputError
from balora_jax.untyped.yaml_text import parse_yaml

WORDS = custom_task("text", "label", ["no", "yes"])
STARS = custom_task("text", "label", ["1", "2", "3"])
TRUTH = custom_task("text", "label", ["false", "true"])
SCORE = custom_task("text", "label", regression=True)
# Task, a literal of JSON, the class or score; None for no label, text for a refusal.
CELLS = [
    (WORDS, '"no"', 0),
    (WORDS, '" yes "', 1),
    (WORDS, "1", 1),
    (WORDS, '"1"', 1),
    (WORDS, "1.0", 1),
    (WORDS, "-1", None),
    (WORDS, "null", None),
    (WORDS, '""', None),
    (WORDS, "true", "got True."),
    (WORDS, '"Yes"', "got 'Yes'. Did you mean 'yes'?"),
    (WORDS, "2", "got 2."),
    (WORDS, "1e40", "got 1e+40."),
    (WORDS, "1e400", "got inf."),
    (WORDS, "0.5", "got 0.5."),
    (WORDS, '["no"]', "got ['no']."),
    (STARS, "1", 0),
    (STARS, '"1"', 0),
    (STARS, "1.0", 0),
    (STARS, '"3.0"', 2),
    (STARS, "0", "got 0."),
    (STARS, "true", "got True."),
    (TRUTH, "true", 1),
    (TRUTH, "false", 0),
    (TRUTH, '"true"', 1),
    (TRUTH, "1", 1),
    (SCORE, "4.5", 4.5),
    (SCORE, '"-1"', -1.0),
    (SCORE, "1e3", 1000.0),
    (SCORE, "1e40", "got 1e+40."),
    (SCORE, "true", "got True."),
    (SCORE, '"1_000"', "got '1_000'."),
    (SCORE, '"2024-01-05"', "got '2024-01-05'."),
    (SCORE, "NaN", None),
]


def outcome(row, task):
    try:
        return label_of(row["label"], task, "row 1")
    except InputError as error:
        return str(error)


def as_wanted(got, wanted):
    return wanted in got if isinstance(wanted, str) else got == wanted


def test_labels_of_json_lines_and_of_parquet(tmp_path):
    lines = "".join(f'{{"text": "a", "label": {literal}}}\n' for _, literal, _ in CELLS)
    (tmp_path / "a.jsonl").write_text(lines)
    rows = load_rows(str(tmp_path / "a.jsonl"))
    for row, (task, literal, wanted) in zip(rows, CELLS, strict=True):
        assert as_wanted(outcome(row, task), wanted), literal
        pq.write_table(pa.table({"label": [json.loads(literal)]}), tmp_path / "a.parquet")
        (row,) = load_rows(str(tmp_path / "a.parquet"))
        assert as_wanted(outcome(row, task), wanted), literal


def test_labels_of_csv_and_tsv(tmp_path):
    """The text of a literal is the cell; `1`, `"1"` and `1.0` are one class again."""
    kept = [cell for cell in CELLS if cell[1] not in ("null", "NaN", '["no"]')]
    texts = [literal.strip('"') for _, literal, _ in kept]
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"a,{text}\n" for text in texts))
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "".join(f"a\t{text}\n" for text in texts))
    for name in ("a.csv", "a.tsv"):
        rows = load_rows(str(tmp_path / name))
        for row, text, (task, _, wanted) in zip(rows, texts, kept, strict=True):
            got = outcome(row, task)
            assert (f"got {text!r}." in got) if isinstance(wanted, str) else got == wanted


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("[no, yes]", ("no", "yes")),
        ("[false, true]", ("false", "true")),
        ("[1, 2, 3]", ("1", "2", "3")),
        ("[01, 1.0]", ("01", "1.0")),
    ],
)
def test_labels_of_a_config_are_words(words, names):
    text = (
        f"{{task: labels, model: {{name_or_path: m}}, training: {{epochs: 1}}, "
        f"data: {{train: a.jsonl, text_columns: [on], labels: {words}}}}}"
    )
    data = parse_config(parse_yaml(text, "", ""), "a.yaml").data
    assert (data.labels, data.text_columns) == (names, ("on",))


NAMES = ["yes", "no"]  # not the order of the task
FEATURES = datasets.Features(
    {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=NAMES)}
)
IDS = [0, 1, -1, None]


def labelled():
    return datasets.Dataset.from_dict({"text": list("abcd"), "label": IDS}, features=FEATURES)


def save_to_disk(folder):
    labelled().save_to_disk(folder / "saved", num_shards=2)
    return "saved"


def save_splits(folder):
    splits = {"train": labelled(), "test": labelled().select([0])}
    datasets.DatasetDict(splits).save_to_disk(folder / "splits")
    return "splits"


def save_parquet(folder):
    labelled().to_parquet(folder / "a.parquet")
    return "a.parquet"


def save_cached(folder):
    """The Arrow stream that `datasets` keeps in its cache."""
    labelled().save_to_disk(folder / "saved")
    return "saved/data-00000-of-00001.arrow"


@pytest.mark.parametrize("save", [save_to_disk, save_splits, save_parquet, save_cached])
def test_a_class_label_is_its_name(tmp_path, save):
    """By its id it would be the other class."""
    rows = load_rows(str(tmp_path / save(tmp_path)))
    assert [row["label"] for row in rows] == ["yes", "no", -1, None]
    assert [row["text"] for row in rows] == list("abcd")
    assert [outcome(row, WORDS) for row in rows] == [1, 0, None, None]
    other = custom_task("text", "label", ["bad", "good"])
    assert outcome(rows[0], other) == (
        "row 1: expected a label of custom (bad, good) or an id from 0 to 1, got 'yes'. Fix the row "
        "or the list of labels."
    )


def test_class_labels_that_are_numbers_are_ids(tmp_path):
    features = datasets.Features({"label": datasets.ClassLabel(names=["0", "1"])})
    table = datasets.Dataset.from_dict({"label": [1, 0]}, features=features)
    table.to_parquet(tmp_path / "a.parquet")
    assert [outcome(row, WORDS) for row in load_rows(str(tmp_path / "a.parquet"))] == [1, 0]


def test_a_class_label_of_the_hub_is_its_name(monkeypatch):
    monkeypatch.setattr(hub.datasets, "load_dataset", lambda *_, **__: labelled())
    rows = load_rows("org/name")
    assert [row["label"] for row in rows] == ["yes", "no", -1, None]
    assert rows[1] == {"text": "b", "label": "no"}
    assert len(load_rows("org/name", limit=2)) == 2


def test_the_names_of_glue_are_those_of_its_task(monkeypatch):
    """Rows of the hub keep the ids that they have there."""
    for task in GLUE.values():
        if task.regression:
            continue
        features = datasets.Features({"label": datasets.ClassLabel(names=list(task.labels))})
        ids = list(range(len(task.labels)))
        found = datasets.Dataset.from_dict({"label": ids}, features=features)
        monkeypatch.setattr(hub.datasets, "load_dataset", lambda *_, found=found, **__: found)
        assert [outcome(row, task) for row in load_rows(str(task.hub))] == ids


def with_features(features):
    schema = pa.schema([("label", pa.int64())], {"huggingface": features})
    return pa.table({"label": [7]}, schema=schema)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (
            '{"info": {"features": {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}}}',
            "row 1: column 'label': expected an id of the 2 classes that the data set names, got 7. ",
        ),
        ("{", "in its schema, got what cannot be read (JSONDecodeError). Write the file again."),
        (
            '{"info": {}}',
            "in its schema, got what cannot be read (KeyError). Write the file again.",
        ),
        ('{"info": {"features": {"label": {"_type": "ClassLabel"}}}}', "be read (KeyError)."),
        ('{"info": {"features": {"x": {"names": ["a"], "_type": "ClassLabel"}}}}', "(KeyError)."),
        ('{"info": {"features": []}}', "be read (AttributeError). Write the file again."),
    ],
)
def test_names_that_do_not_fit_are_refused(tmp_path, features, message):
    pq.write_table(with_features(features), tmp_path / "a.parquet")
    with pytest.raises(InputError) as error:
        list(load_rows(str(tmp_path / "a.parquet")))
    assert str(error.value).startswith(str(tmp_path / "a.parquet"))
    assert message in str(error.value)


def test_what_is_no_whole_saved_set_is_refused(tmp_path):
    save_splits(tmp_path)
    folder = tmp_path / "splits"
    assert len(load_rows(str(folder), split="test")) == 1
    with pytest.raises(InputError, match=r"the split 'dev', got the splits train, test\. Name one"):
        load_rows(str(folder), split="dev")
    (folder / "train" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(InputError, match=r"got none called 'data-00000-of-00001\.arrow'\. Copy"):
        load_rows(str(folder))
    (folder / "test" / "state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}')
    with pytest.raises(InputError, match=r"got none called '../x.arrow'. Copy the folder again."):
        load_rows(str(folder), split="test")
    (folder / "test" / "state.json").write_text('{"_data_files": []}')
    with pytest.raises(InputError, match="expected at least one row, got an empty data set"):
        load_rows(str(folder), split="test")
