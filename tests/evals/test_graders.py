"""Graders by name, and reference solutions given back word for word."""

import gzip
import json
from pathlib import Path

import pytest

from balora_jax.errors import InputError
from balora_jax.evals import grading
from balora_jax.evals.judge import has_math_verify
from balora_jax.evals.tasks import BENCHMARKS
from balora_jax.tasks.settings import check_settings
from balora_jax.tasks.text import run, score
from tests.evals.test_score import config

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "math"
MARKERS = ("The answer is:", "####", r"\boxed{")


def shared_rows(name):
    file = SHARED / f"{name}.jsonl.gz"
    if not file.is_file():
        pytest.skip("the shared folder is not there")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def scored(name, rows, column, marker="The answer is:", grader="auto", text=str):
    """The figures of a model that repeats the cells of the right answers."""
    benchmark = BENCHMARKS[name]
    golds = [benchmark.gold(row, column, marker) for row in rows]
    return benchmark.score([text(row[column]) for row in rows], golds, marker, grader)


@pytest.mark.parametrize("task", ["own", "exact_match"])
@pytest.mark.parametrize(
    ("own", "file", "column", "count"),
    [
        ("gsm8k", "gsm8k_test", "answer", 1319),
        ("math", "math_test", "solution", 5000),
        ("math", "math500", "solution", 500),
        ("math", "math500", "answer", 500),
        ("gsm_hard", "gsm_hard", "target", 1319),
        ("svamp", "svamp", "Answer", 1000),
    ],
)
def test_reference_solutions_are_all_right(task, own, file, column, count):
    rows = shared_rows(file)
    if column == "answer" and own == "math":
        own = "exact_match"  # no box around these
    figures = scored(own if task == "own" else task, rows, column)
    assert figures["exact_match"] == figures["answered"] == 1.0
    assert figures["rows"] == count


@pytest.mark.parametrize("marker", MARKERS)
def test_reference_solutions_are_right_under_any_marker(marker):
    for file, column in (("gsm8k_test", "answer"), ("math500", "solution")):
        if marker == r"\boxed{" and column == "solution":
            continue  # what follows such a marker is a box without its beginning
        assert scored("exact_match", shared_rows(file), column, marker)["exact_match"] == 1.0


SMALL = {
    "gsm8k": ("answer", [{"question": "?", "answer": "7 = <<3+4=7>>7\n#### 1,010"}]),
    "math": ("solution", [{"problem": "?", "solution": r"so \boxed{\frac{1}{2}}."}]),
    "svamp": ("Answer", [{"Body": "b", "Question": "?", "Answer": a} for a in (145.0, 3, "19.0")]),
    "gsm_hard": (
        "target",
        [{"input": "?", "target": t} for t in (2125904.0, -9867630.0, 0.0016791648, 1e16)],
    ),
    "asdiv": (
        "answer",
        [
            {"body": "b", "question": "?", "answer": a}
            for a in ("9 (apples)", "1/2 (of a cake)", "3:4", "145.5", "30 (%)")
        ],
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_small_rows_with_the_columns_of_each_set(name):
    column, rows = SMALL[name]
    benchmark = BENCHMARKS[name]
    assert benchmark.gold_column == column
    assert benchmark.prompt_column in rows[0]
    if benchmark.question is not None:
        assert benchmark.question(rows[0]).endswith("?")
    assert scored(name, rows, column)["exact_match"] == 1.0
    wrong = scored(name, rows, column, text=lambda cell: "The answer is: 77")
    assert (wrong["exact_match"], wrong["answered"]) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("cell", "gold"),
    [(2125904.0, "2125904"), (-0.5, "-0.5"), (1e16, "10000000000000000"), (1e-7, "0.0000001")],
)
def test_floats_are_golds_without_a_point_or_an_exponent(cell, gold):
    assert BENCHMARKS["svamp"].gold({"Answer": cell}, "Answer", "") == gold


def test_an_answer_of_gsm_hard_is_right_within_a_thousandth():
    rows = [{"input": "?", "target": 762573.3333333334}] * 3
    texts = ["The answer is: 762573.333", "The answer is: 762573.332", "#### 762573"]
    benchmark = BENCHMARKS["gsm_hard"]
    golds = [benchmark.gold(row, "target", "") for row in rows]
    figures = benchmark.score(texts, golds, "The answer is:")
    assert figures["exact_match"] == 1 / 3
    assert figures["grader"] == "gsm_hard"


TEXTS = [
    "so 9 * 2 = <<9*2=18>>18\n#### 18\nThe answer is: 18",  # right in every way
    "#### 18.",  # no marker
    "The answer is: 18.4",  # rounded by the authors
    "It is $18",  # only the last number
    "The answer is: 17 + 1",  # a sum
]


@pytest.mark.parametrize(
    ("grader", "right"),
    [
        ("plain", [1, 1, 0, 0, 0]),
        ("math_verify", [1, 1, 0, 0, 1]),
        ("authors", [1, 0, 1, 0, 0]),
        ("lm_eval_strict", [1, 1, 0, 0, 0]),
        ("lm_eval_flexible", [1, 1, 0, 1, 0]),
    ],
)
def test_graders_of_gsm8k_by_hand(grader, right):
    if grader == "math_verify" and not has_math_verify():
        pytest.skip("math-verify is not installed")
    benchmark = BENCHMARKS["gsm8k"]
    if grader != "math_verify":  # it starts a process each time
        assert right == [
            benchmark.score([text], ["18"], "The answer is:", grader)["exact_match"]
            for text in TEXTS
        ]
    figures = benchmark.score(TEXTS, ["18"] * 5, "The answer is:", grader)
    assert figures["grader"] == grader
    assert figures["exact_match"] == sum(right) / 5


@pytest.mark.parametrize(
    ("text", "marker", "answer"),
    [
        ("The answer is: 18", "The answer is:", "18"),
        ("The answer is:18", "The answer is:", None),  # their marker ends in a space
        ("The answer is: 3/4", "The answer is:", "1"),
        ("The answer is: 1/0", "The answer is:", "1"),
        ("The answer is: /4", "The answer is:", None),
        ("The answer is: 2.5", "The answer is:", "2"),  # to the even one
        ("The answer is: none", "The answer is:", None),
        ("The answer is: " + "9" * 400, "The answer is:", None),
    ],
)
def test_whole_numbers_of_the_authors(text, marker, answer):
    assert grading_of("gsm8k", "authors").read(text, marker) == answer


def grading_of(task, name):
    return next(grader for grader in BENCHMARKS[task].graders if grader.name == name)


@pytest.mark.parametrize("name", ["lm_eval_strict", "lm_eval_flexible"])
def test_texts_end_where_lm_eval_would_have_stopped(name):
    grader = grading_of("gsm8k", name)
    assert grader.read("Question: #### 5", "") is None
    assert grader.read("#### 4 Question: #### 5", "") == "4"
    for name in ("lm_eval_strict", "lm_eval_flexible"):
        assert grading_of("math", name).read("$4$ Problem: $5$", "") == "4"


def refused(**changes):
    with pytest.raises(InputError) as caught:
        config(**changes)
    return str(caught.value)


def test_a_grader_fits_its_benchmark():
    assert refused(eval={"grader": "authors", "task": "exact_match"}) == (
        "test: eval.grader: expected one of auto, math_verify, plain with eval.task exact_match, "
        "got authors. Choose one of them, or another benchmark."
    )
    assert "one of auto, authors, lm_eval_strict, lm_eval_flexible with eval.task gsm_hard" in (
        refused(eval={"grader": "plain", "task": "gsm_hard"})
    )
    settings = config(eval={"task": "gsm8k", "grader": "authors"})
    check_settings(settings)
    assert settings.eval.grader == "authors"


def test_a_marker_that_is_not_read_is_refused():
    assert refused(eval={"grader": "lm_eval_strict", "task": "gsm8k"}) == (
        "test: eval.marker: expected 'The answer is:' with eval.grader lm_eval_strict, got '#': it "
        "reads no marker. Leave it out."
    )


def test_math_verify_is_missing(monkeypatch):
    monkeypatch.setattr(grading, "has_math_verify", lambda: False)
    assert refused(eval={"grader": "math_verify"}) == (
        "test: eval.grader: expected the package math-verify with math_verify, got none that "
        "starts. Install it with pip install '.[eval]', or take auto or plain."
    )
    assert BENCHMARKS["math"].score([], [], "")["grader"] == "plain"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": None}, "eval.gold_column: expected a right answer in 'answer', got null."),
        ({"answer": ""}, "eval.gold_column: expected a right answer in 'answer', got ''."),
        ({"answer": "  "}, "eval.gold_column: expected a right answer in 'answer', got '  '."),
        ({"answer": [2]}, "eval.gold_column: expected a right answer in 'answer', got [2]."),
        (
            {"answer": {"a": 2}},
            "eval.gold_column: expected a right answer in 'answer', got {'a': 2}.",
        ),
        ({}, "eval.gold_column: expected the column 'answer' in the validation rows, got question"),
    ],
)
@pytest.mark.parametrize("task", ["exact_match", "gsm8k", "asdiv"])
def test_a_row_without_an_answer_is_refused_before_anything_is_loaded(row, message, task, tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"question": "1+1", "answer": "#### 2"}, {"question": "2+2", **row}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = config(data={"validation": str(file)}, eval={"task": task})
    with pytest.raises(InputError) as caught:
        run.evaluate(settings, adapter=None)  # its model does not exist
    assert str(caught.value).startswith(f"row 2 of the validation rows: {message}")
    with pytest.raises(InputError, match="row 2 of the validation rows"):
        run._open(settings)


def test_a_float_that_is_no_number_is_no_answer():
    with pytest.raises(InputError, match="expected a right answer in 'Answer', got nan"):
        BENCHMARKS["svamp"].gold({"Answer": float("nan")}, "Answer", "")


def test_a_row_without_the_mark_of_its_benchmark_is_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "1+1", "answer": "2"}\n')
    settings = config(data={"validation": str(file)}, eval={"task": "gsm8k"})
    with pytest.raises(InputError) as caught:
        score.asked_of(settings.data, settings.eval, BENCHMARKS["gsm8k"])
    assert str(caught.value) == (
        "row 1 of the validation rows: eval.gold_column: expected an answer after '####' in "
        "'answer', got '2'. Check that the column holds GSM8K answers."
    )
