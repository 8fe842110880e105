"""From texts and right answers to a score."""

from fractions import Fraction
from types import SimpleNamespace

import jax
import pytest
from transformers import AutoTokenizer

from balora_jax.config_file import parse_config
from balora_jax.errors import InputError
from balora_jax.evals.benchmark import TextBenchmark
from balora_jax.evals.judge import has_math_verify
from balora_jax.evals.tasks import BENCHMARKS
from balora_jax.evals.tasks.exact_match import gold_answer
from balora_jax.tasks.settings import benchmark_of
from balora_jax.tasks.text import run, score
from tests import tiny_run

MARKER = "The answer is:"
OURS = "math_verify" if has_math_verify() else "plain"


def benchmark(name):
    found = BENCHMARKS[name]
    assert isinstance(found, TextBenchmark)
    return found


def score_answers(texts, golds, marker):
    return benchmark("exact_match").score(texts, golds, marker)


@pytest.mark.parametrize(
    ("cell", "gold"),
    [
        ("Ten minus 3.\n#### 7", "7"),
        ("5 * 2 = <<5*2=10>>10\n#### 1,010", "1,010"),
        ("So x = 4. The answer is: 4", "4"),
        ("The answer is: 1\nNo. The answer is: 2", "2"),
        (r"Hence \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"First \boxed{1}, then \boxed{2}", "2"),
        ("  42 ", "42"),
        (42, "42"),
        (-0.5, "-0.5"),
    ],
)
def test_gold_answer(cell, gold):
    assert gold_answer({"output": cell}, "output", MARKER) == gold


def test_gold_column_is_missing():
    with pytest.raises(InputError) as caught:
        gold_answer({"question": "?", "response": "!"}, "output", MARKER)
    assert str(caught.value) == (
        "eval.gold_column: expected the column 'output' in the validation rows, got question, "
        "response. Name the column of the right answer."
    )


def test_score_by_hand():
    texts = [
        "Sum. The answer is: 1,200",  # right, another spelling
        "The answer is: $3.50",  # right
        "The answer is: 8",  # wrong
        "It is 5",  # right, but not stated
        "The answer is: 2/4",  # right
    ]
    golds = ["1200", "3.5", "9", "5", "0.5"]
    assert score_answers(texts, golds, MARKER) == {
        "exact_match": 0.6,
        "answered": 0.8,
        "rows": 5,
        "grader": OURS,
        "undecided": 0,
    }


def test_score_of_nothing():
    assert score_answers([], [], MARKER) == {
        "exact_match": 0.0,
        "answered": 0.0,
        "rows": 0,
        "grader": OURS,
        "undecided": 0,
    }


@pytest.mark.parametrize(
    ("name", "row", "gold"),
    [
        ("gsm8k", {"question": "?", "answer": "7 = <<3+4=7>>7\n#### 1,010"}, "1,010"),
        (
            "math",
            {"problem": "?", "solution": r"\boxed{1} or $\boxed{\frac{1}{2}}$."},
            r"\frac{1}{2}",
        ),
    ],
)
def test_the_right_answers_of_benchmarks(name, row, gold):
    found = benchmark(name)
    assert found.prompt_column in row
    assert found.gold(row, found.gold_column, "unused") == gold
    cell = row[found.gold_column].replace("####", "").replace(r"\boxed", "")
    with pytest.raises(InputError, match=r"eval\.gold_column: expected an? .*answer.*, got"):
        found.gold({found.gold_column: cell}, found.gold_column, "unused")
    with pytest.raises(InputError, match=r"eval\.gold_column: expected the column"):
        found.gold({"other": "1"}, found.gold_column, "unused")


def test_math_reads_what_is_boxed_where_nothing_is_stated():
    texts = [r"\boxed{3}", r"\boxed{3} The answer is: 4", "It is 3"]
    figures = benchmark("math").score(texts, ["3", "4", "3"], MARKER)
    assert figures["exact_match"] == figures["answered"] == 2 / 3


def test_a_benchmark_scores_the_models_of_its_task():
    with pytest.raises(InputError) as caught:
        config(eval={"task": "labels"})
    assert str(caught.value) == (
        "test: eval.task: expected one of exact_match, gsm8k, gsm_hard, svamp, asdiv, math, none with task text, got "
        "labels, which scores labels. Choose one of them, or leave it out."
    )
    with pytest.raises(InputError, match=r"eval\.task: expected a benchmark, one of exact_match, "):
        config(eval={"task": "exactmatch"})


def test_unequal_numbers_of_texts_and_answers():
    with pytest.raises(ValueError, match="argument"):
        score_answers(["a"], [], MARKER)


def config(**changes):
    tree = {
        "model": {"name_or_path": "nowhere"},
        "data": {
            "train": "rows.jsonl",
            "template": "{question}=",
            "prompt_column": "question",
            "response_column": "answer",
        },
        "training": {"max_steps": 1},
        "eval": {"marker": "#"},
    }
    for section, values in changes.items():
        tree[section] |= values
    return parse_config(tree, "test")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One id for each character."""
    folder = tiny_run.write_model(tmp_path_factory.mktemp("tokenizer"))
    return AutoTokenizer.from_pretrained(folder)


def adder(tokenizer):
    """An answerer that can add, but only small numbers."""

    def answer(parts, prompts, key, title):
        texts = tokenizer.batch_decode(prompts, skip_special_tokens=True)
        assert title == "before"
        sums = [sum(map(int, text.rstrip("=").split("+"))) for text in texts]
        return [f" so #{value}" if value < 10 else "?" for value in sums]

    answer.tokenizer = tokenizer
    return answer


def scored(tokenizer, rows, config, monkeypatch):
    """What the adder's score is on rows that stand for those of a file."""
    monkeypatch.setattr(score, "load_rows", lambda source, split, limit: rows)
    data = config.data.model_copy(update={"validation": "unread"})
    asked = score.asked_of(data, config.eval, benchmark_of(config.task, config.eval.task))
    exam = score.exam_of(tokenizer, data, config.eval, asked)
    return exam.score(adder(tokenizer), (), key=jax.random.key(0), title="before")


def test_rows_are_prompted_answered_and_scored(tokenizer, capsys, monkeypatch):
    rows = [{"question": f"{a}+{b}", "answer": f"#{a + b}"} for a, b in ((1, 2), (4, 5), (8, 9))]
    rows.append({"question": "2+2", "answer": "#5"})
    figures, predictions, _ = scored(tokenizer, rows, config(), monkeypatch)
    counts = {"exact_match": 0.5, "answered": 0.75, "rows": 4}
    assert figures == {**counts, "grader": OURS, "undecided": 0}
    printed = capsys.readouterr().out
    assert printed == (
        f"before: exact match 0.500 on 4 rows, by the grader {OURS}; first answer: 'so #3' "
        "(right: 3)\n"
    )
    assert predictions == [
        {"row": 1, "question": "1+2", "gold": "3", "text": " so #3", "answer": "3", "right": True},
        {"row": 2, "question": "4+5", "gold": "9", "text": " so #9", "answer": "9", "right": True},
        {"row": 3, "question": "8+9", "gold": "17", "text": "?", "answer": None, "right": False},
        {"row": 4, "question": "2+2", "gold": "5", "text": " so #4", "answer": "4", "right": False},
    ]


def test_verdicts_agree_with_a_plain_look_at_the_texts():
    """Over every pair of a text and a right answer: the numbers behind the marker, as fractions."""
    texts = [f"so {MARKER} {text}" for text in ("4", "4.0", "-4", "1/2", "0.5", "1,200", "")]
    golds = ["4", "1/2", "1200"]
    pairs = [(text, gold) for text in texts for gold in golds]
    figures, verdicts = benchmark("exact_match").judged(*zip(*pairs, strict=True), MARKER)
    stated = [text.partition(MARKER)[2].strip().replace(",", "") for text, _ in pairs]
    right = [
        said != "" and Fraction(said) == Fraction(gold)
        for said, (_, gold) in zip(stated, pairs, strict=True)
    ]
    assert [verdict.right for verdict in verdicts] == right
    assert [verdict.answer is not None for verdict in verdicts] == [said != "" for said in stated]
    assert figures["exact_match"] == sum(right) / len(pairs)


def test_a_score_of_ones_own_keeps_its_figures_and_says_nothing_of_rows(
    tokenizer, capsys, monkeypatch
):
    class Lengths(TextBenchmark):
        def score(self, texts, golds, marker, grader="auto"):
            return {**super().score(texts, golds, marker, grader), "length": len(texts[0])}

    monkeypatch.setitem(
        BENCHMARKS._items, "lengths", Lengths(name="lengths", gold=lambda row, *_: row["answer"])
    )
    rows = [{"question": "1+2", "answer": "3"}]
    figures, predictions, _ = scored(tokenizer, rows, config(eval={"task": "lengths"}), monkeypatch)
    assert (figures["length"], figures["exact_match"]) == (6, 1.0)
    assert predictions == [{"row": 1, "question": "1+2", "gold": "3", "text": " so #3"}]


def test_gold_column_of_its_own(tokenizer, capsys, monkeypatch):
    rows = [{"question": "1+1", "answer": "unused", "right": 2}]
    settings = config(eval={"gold_column": "right"})
    figures, _, _ = scored(tokenizer, rows, settings, monkeypatch)
    assert figures["exact_match"] == 1.0
    assert "(right: 2)" in capsys.readouterr().out


def test_nothing_to_score():
    with pytest.raises(InputError) as caught:
        run.evaluate(config(), adapter=None)
    assert str(caught.value) == (
        "data.validation: expected rows to score, got none. Name a file with --set "
        "data.validation=FILE."
    )


def test_limits_of_the_validation_rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"question": "{i}", "answer": "{i}"}}\n' for i in range(6)))

    def count(data, evaluation):
        settings = config(data={"validation": str(file), **data}, eval=evaluation)
        rows = score.validation_rows(
            settings.data, settings.eval, benchmark_of(settings.task, settings.eval.task)
        )
        return [row["question"] for row in rows]

    assert count({}, {}) == list("012345")
    assert count({"validation_limit": 4}, {"limit": 2}) == ["0", "1"]
    assert count({"validation_limit": 3}, {}) == ["0", "1", "2"]
    assert count({}, {"task": "none"}) == []


def test_sampling_stops_at_eos_and_pads_with_a_row_of_the_table(tmp_path):
    from balora_jax.pretrained.checkpoint import open_base
    from balora_jax.pretrained.load import sampling_for
    from tests.tiny_run import VOCAB_SIZE, write_inputs

    write_inputs(tmp_path / "in")
    base = open_base(str(tmp_path / "in" / "model"))

    def sampling(eos, pad):
        return sampling_for(base, SimpleNamespace(eos_token_id=eos, pad_token_id=pad), 5, 0.5, 0.9)

    assert (sampling(2, 0).stop_ids, sampling(2, 0).pad_id) == ((2,), 0)
    assert (sampling(2, None).stop_ids, sampling(2, None).pad_id) == ((2,), 2)
    assert (sampling(None, None).stop_ids, sampling(None, None).pad_id) == ((), 0)
    assert sampling(2, VOCAB_SIZE).pad_id == 2
    assert sampling(VOCAB_SIZE, VOCAB_SIZE).pad_id == 0
    assert sampling(2, 0).temperature == 0.5
    assert sampling(2, 0).top_p == 0.9
