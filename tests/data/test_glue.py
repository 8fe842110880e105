"""Rows of labels: GLUE's columns and label order, every spelling of a label, and every refusal."""

import collections
import datetime
import gzip
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from balora_jax.data.glue import GLUE, custom_task, glue_task, label_cell, label_of, texts_of
from balora_jax.data.sources import load_rows
from balora_jax.errors import InputError

STARS = custom_task("review", "stars", ["1", "2", "3", "4", "5"])
FLAG = custom_task("text", "toxic", ["false", "true"])
YES = custom_task("text", "toxic", ["no", "yes"])
PYTHONIC = custom_task("text", "toxic", ["False", "True"])
ZEROS = custom_task("text", "code", ["01", "1"])
WIDE = custom_task("text", "code", ["9007199254740992", "2"])
HALVES = custom_task("text", "points", ["0", "0.5", "1"])
DATES = custom_task("text", "day", ["2024-01-05", "2024-01-06"])
POINTS = custom_task(("a", "b"), "points", regression=True)


def test_the_nine_tasks_are_as_published():
    """Columns, class names in id order and metrics, written down from the data set's card."""
    published = {
        "cola": ("sentence", "unacceptable acceptable", "matthews"),
        "sst2": ("sentence", "negative positive", "accuracy"),
        "mrpc": ("sentence1 sentence2", "not_equivalent equivalent", "accuracy f1"),
        "stsb": ("sentence1 sentence2", "", "pearson spearman"),
        "qqp": ("question1 question2", "not_duplicate duplicate", "accuracy f1"),
        "mnli": ("premise hypothesis", "entailment neutral contradiction", "accuracy"),
        "qnli": ("question sentence", "entailment not_entailment", "accuracy"),
        "rte": ("sentence1 sentence2", "entailment not_entailment", "accuracy"),
        "wnli": ("sentence1 sentence2", "not_entailment entailment", "accuracy"),
    }
    made = {
        name: tuple(" ".join(part) for part in (task.text_columns, task.labels, task.metrics))
        for name, task in GLUE.items()
    }
    assert made == published
    for name, task in GLUE.items():
        assert glue_task(name) is task
        assert (task.name, task.hub) == (name, f"nyu-mll/glue:{name}")
        assert task.train_split == "train"
        assert task.label_columns[0] == "label"
        assert hash(task) == hash(glue_task(name))
        if name != "mnli":
            assert task.validation_splits == {"validation": "validation"}
    assert list(GLUE["mnli"].validation_splits.items()) == [
        ("validation_matched", "validation_matched"),
        ("validation_mismatched", "validation_mismatched"),
    ]


def test_outputs_and_regression():
    assert {name: (task.outputs, task.regression) for name, task in GLUE.items()} == {
        **dict.fromkeys(("cola", "sst2", "mrpc", "qqp", "qnli", "rte", "wnli"), (2, False)),
        "mnli": (3, False),
        "stsb": (1, True),
    }


@pytest.mark.parametrize(
    ("name", "hint"),
    [("SST-2", " Did you mean 'sst2'?"), ("mnli-mm", " Did you mean 'mnli'?"), ("squad", "")],
)
def test_an_unknown_task_is_refused(name, hint):
    with pytest.raises(InputError) as error:
        glue_task(name)
    assert str(error.value) == (
        "data.glue: expected one of cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, got "
        f"{name!r}.{hint} Choose one of these."
    )


def test_custom_tasks():
    assert STARS.text_columns == ("review",)
    assert (STARS.outputs, STARS.metrics, STARS.hub) == (5, ("accuracy",), None)
    assert (FLAG.label_columns, FLAG.metrics) == (("toxic",), ("accuracy", "f1"))
    assert POINTS.text_columns == ("a", "b")
    assert (POINTS.regression, POINTS.metrics) == (True, ("pearson", "spearman"))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("t", "y"), {}, "labels: expected the names of the classes, got none. "),
        (("t", "y", ["a", "b"]), {"regression": True}, "labels: expected none for regression, got"),
        (("t", "y", ["a"]), {}, "labels: expected at least two different names, got ['a']. "),
        (("t", "y", ["a", "a "]), {}, "labels: expected at least two different names, got"),
        (("t", "y", ["a", " "]), {}, "labels: expected at least two different names, got"),
        ((["t", "u", "v"], "y", ["a", "b"]), {}, "text_columns: expected one column or two, got 3"),
        (([], "y", ["a", "b"]), {}, "text_columns: expected one column or two, got 0. "),
        ((["t", "y"], "y", ["a", "b"]), {}, "input, got the label column 'y', which would show"),
    ],
)
def test_bad_tasks_are_refused(arguments, options, message):
    with pytest.raises(InputError) as error:
        custom_task(*arguments, **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("task", "cell", "label"),
    [
        (GLUE["mnli"], "contradiction", 2),
        (GLUE["mnli"], " neutral\n", 1),
        (GLUE["mnli"], 2, 2),
        (GLUE["mnli"], "2", 2),
        (GLUE["mnli"], 2.0, 2),
        (GLUE["mnli"], "0.0", 0),
        (GLUE["mnli"], np.int64(1), 1),
        (GLUE["wnli"], "entailment", 1),
        (GLUE["rte"], "entailment", 0),
        # Names that are numbers are names in every file format.
        (STARS, "5", 4),
        (STARS, 5, 4),
        (STARS, 5.0, 4),
        (FLAG, True, 1),
        (FLAG, False, 0),
        (FLAG, "true", 1),
        (FLAG, np.bool_(True), 1),
        (PYTHONIC, True, 1),
        (PYTHONIC, "False", 0),
        (YES, "no", 0),
        (YES, 1, 1),
        (STARS, "5.0", 4),
        (STARS, "+5", 4),
        (STARS, np.float32(5), 4),
        (ZEROS, "01", 0),
        (ZEROS, "1", 1),
        (WIDE, 9007199254740992, 0),
        (WIDE, "9007199254740992", 0),
        (HALVES, 0.5, 1),
        (HALVES, "0.50", 1),
        (custom_task("t", "y", ["-1", "0", "1"]), -1, 0),
    ],
)
def test_spellings_of_a_class(task, cell, label):
    made = label_of(cell, task, "row 1")
    assert made == label
    assert type(made) is int


@pytest.mark.parametrize(
    ("task", "cell", "label"),
    [
        (GLUE["stsb"], 3.8, 3.8),
        (GLUE["stsb"], "3.8", 3.8),
        (GLUE["stsb"], 5, 5.0),
        (GLUE["stsb"], 0.0, 0.0),
        (POINTS, -1, -1.0),
        (POINTS, "-2e3", -2000.0),
    ],
)
def test_spellings_of_a_score(task, cell, label):
    made = label_of(cell, task, "row 1")
    assert made == np.float32(label)
    assert type(made) is np.float32


@pytest.mark.parametrize("cell", [None, "", " \t", float("nan")])
@pytest.mark.parametrize("task", [GLUE["sst2"], GLUE["stsb"], STARS, POINTS])
def test_an_empty_cell_is_no_label(task, cell):
    assert label_of(cell, task, "row 1") is None


@pytest.mark.parametrize("cell", [-1, "-1", -1.0])
@pytest.mark.parametrize("task", [GLUE["sst2"], GLUE["stsb"], STARS])
def test_glues_mark_of_a_test_row_is_no_label(task, cell):
    assert label_of(cell, task, "row 1") is None


LONG = custom_task("t", "y", [f"intent_{i}" for i in range(9)])
WITH_IDS = "(entailment, neutral, contradiction) or an id from 0 to 2"


@pytest.mark.parametrize(
    ("task", "cell", "message"),
    [
        (GLUE["mnli"], 3, f"row 7: expected a label of mnli {WITH_IDS}, got 3. "),
        (GLUE["mnli"], "-2", "got '-2'. "),
        (GLUE["mnli"], 0.5, "got 0.5. "),
        (GLUE["mnli"], "Neutrl", "got 'Neutrl'. Did you mean 'neutral'? Fix the row"),
        (GLUE["mnli"], True, "got True. "),
        (GLUE["mnli"], [1], "got [1]. "),
        (STARS, 0, "row 7: expected a label of custom (1, 2, 3, 4, 5), got 0."),
        (LONG, "x", "(intent_0, intent_1, intent_2, intent_3, intent_4, intent_5, …) or an id"),
        (GLUE["stsb"], 5.1, "row 7: expected a score from 0 to 5 as label, got 5.1. Fix the row."),
        (GLUE["stsb"], "high", "row 7: expected a score from 0 to 5 as label, got 'high'. "),
        (POINTS, float("inf"), "row 7: expected a number as label, got inf. "),
        (POINTS, True, "row 7: expected a number as label, got True. "),
        (
            POINTS,
            10**400,
            "3.40282e+38, as 32 bits hold, as label, got a whole number of 1329 bits.",
        ),
        (
            POINTS,
            1e40,
            "row 7: expected a number from -3.40282e+38 to 3.40282e+38, as 32 bits hold,",
        ),
        (POINTS, "1e999999999", "as label, got '1e999999999'. Fix the row."),
        (POINTS, "1_000", "row 7: expected a number as label, got '1_000'. Fix the row."),
        (GLUE["mnli"], 1e40, "or an id from 0 to 2, got 1e+40. "),
        (GLUE["mnli"], "1e999999999", "got '1e999999999'. "),
        (STARS, 9007199254740993, "got 9007199254740993. "),
        (WIDE, 9007199254740993, "got 9007199254740993. "),
        (STARS, True, "got True. "),
        (YES, True, "row 7: expected a label of custom (no, yes) or an id from 0 to 1, got True. "),
        (YES, "No", "got 'No'. Did you mean 'no'? Fix the row or the list of labels."),
        (FLAG, 1.5, "got 1.5. "),
        (FLAG, "True", "got 'True'. Did you mean 'true'? Fix the row or the list of labels."),
        (
            DATES,
            datetime.date(2024, 1, 5),
            "got datetime.date(2024, 1, 5). Fix the row or the list",
        ),
        (YES, b"yes", "got b'yes'. "),
        (YES, {"a": "yes"}, "got {'a': 'yes'}. "),
    ],
)
def test_a_label_outside_the_task_is_refused(task, cell, message):
    with pytest.raises(InputError) as error:
        label_of(cell, task, "row 7")
    assert message in str(error.value)


@given(
    names=st.lists(st.text(st.characters(codec="ascii"), min_size=1), min_size=2, max_size=6)
    .map(lambda names: [name.strip() for name in names])
    .filter(lambda names: "" not in names and len(set(names)) == len(names))
)
def test_every_name_means_its_own_place(names):
    task = custom_task("t", "y", names)
    assert [label_of(name, task, "row 1") for name in names] == list(range(len(names)))


def test_texts():
    assert texts_of({"sentence": " a\n", "label": 1}, GLUE["sst2"], "row 1") == [" a\n"]
    pair = {"question2": "b", "question1": "a"}
    assert texts_of(pair, GLUE["qqp"], "row 1") == ["a", "b"]
    assert texts_of({"question1": "a", "question2": ""}, GLUE["qqp"], "row 1") == ["a", ""]
    assert texts_of({"a": 7, "b": "x"}, POINTS, "row 1") == ["7", "x"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question1": "a"}, "row 4: expected a column 'question2', got the columns question1. "),
        ({"question1": "a", "question2": None}, "in the column 'question2', got an empty cell."),
        ({"question1": ["a"], "question2": "b"}, "in the column 'question1', got a list."),
        (
            {"question1": " ", "question2": ""},
            "row 4: expected text in 'question1' or 'question2', got an empty cell. Fill the cell",
        ),
    ],
)
def test_rows_without_text_are_refused(row, message):
    with pytest.raises(InputError) as error:
        texts_of(row, GLUE["qqp"], "row 4")
    assert message in str(error.value)


def test_the_column_of_the_label():
    assert label_cell({"score": 3.0}, GLUE["stsb"], "row 1") == 3.0
    assert label_cell({"score": 3.0, "label": 2.0}, GLUE["stsb"], "row 1") == 2.0
    with pytest.raises(InputError) as error:
        label_cell({"sentence1": "a", "labels": 1}, GLUE["stsb"], "row 2")
    assert str(error.value) == (
        "row 2: expected a column 'label' or 'score' with the label, got the columns sentence1, "
        "labels. Did you mean 'labels'? Name the column of your data."
    )


# Rows of each class of the public validation splits, by id.
COUNTS = {
    "cola_dev": {0: 322, 1: 721},
    "sst2_dev": {0: 428, 1: 444},
    "mrpc_dev": {0: 129, 1: 279},
    "rte_dev": {0: 146, 1: 131},
    "qnli_dev": {0: 2702, 1: 2761},
    "mnli_dev_sample": {0: 347, 1: 333, 2: 320},
}


@pytest.mark.parametrize("name", COUNTS)
def test_classes_of_the_real_files(shared, name):
    task = glue_task(name.split("_")[0])
    rows = load_rows(str(shared / "data" / "glue" / f"{name}.jsonl.gz"))
    labels = [label_of(label_cell(row, task, "row"), task, "row") for row in rows]
    assert collections.Counter(labels) == COUNTS[name]


def test_scores_of_the_real_file(shared):
    path, task = shared / "data" / "glue" / "stsb_dev.jsonl.gz", GLUE["stsb"]
    rows = load_rows(str(path))
    scores = [label_of(label_cell(row, task, "row"), task, "row") for row in rows]
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        expected = [json.loads(line)["score"] for line in lines]
    assert len(scores) == 1500
    np.testing.assert_array_equal(scores, np.float32(expected))
