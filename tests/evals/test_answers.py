"""Answers: values by hand, formats by hypothesis, and the gold answers of real data."""

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balora_jax.evals.answers import bare_answer, extract_answer, last_boxed, read_answer
from balora_jax.evals.equality import exact_match
from balora_jax.evals.mathematics import normalise_math, parts_of
from balora_jax.evals.numbers import parse_number, units_of

SHARED = Path(__file__).parents[2].parent / "shared"

NUMBERS = {
    "0": 0,
    "42": 42,
    "007": 7,
    " 42\n": 42,
    "42.": 42,
    "42,": 42,
    "1,234,": 1234,
    "+5": 5,
    "-5": -5,
    "- 5": -5,
    "−5": -5,
    "–5": -5,
    "1,234": 1234,
    "1,234,567": 1234567,
    "12,345,678.": 12345678,
    "1,234.50": Fraction(2469, 2),
    "-1,234,567.25": Fraction(-4938269, 4),
    "0.1": Fraction(1, 10),
    ".5": Fraction(1, 2),
    "-.5": Fraction(-1, 2),
    "5.": 5,
    "3/4": Fraction(3, 4),
    "-3/4": Fraction(-3, 4),
    "3 / 4": Fraction(3, 4),
    "6/3": 2,
    "1,000/2": 500,
    "0.5/0.25": 2,
    "1 1/2": Fraction(3, 2),
    "-1 1/2": Fraction(-3, 2),
    "2 3/4 cups": Fraction(11, 4),
    "$5": 5,
    "$ 5.00": 5,
    r"\$5": 5,
    "-$5": -5,
    "$-5": -5,
    "$1,000,000": 1000000,
    "$42$": 42,
    "5$": 5,
    "€7": 7,
    "£7": 7,
    "50%": 50,
    r"50\%": 50,
    "50 %": 50,
    "12.5%.": Fraction(25, 2),
    "42 apples": 42,
    "42 apples.": 42,
    "$18 per day": 18,
    "60 km/h": 60,
    "60km/h": 60,
    "25cm": 25,
    "3 sq. ft.": 3,
    "5 m": 5,
    "1/2 cup": Fraction(1, 2),
    "20% of the class": 20,
    "42\u00a0kg": 42,
    "1e5": 100000,
    "1.5E-3": Fraction(3, 2000),
    "-2e+2": -200,
    r"2.5 \times 10^3": 2500,
    r"2 \cdot 10^{-3}": Fraction(1, 500),
    "3 x 10^4": 30000,
    "3 million": 3000000,
    "$1.5 billion dollars": 1500000000,
    "3/4 of a mile": Fraction(3, 4),
}
NOT_NUMBERS = [
    "",
    " ",
    "-",
    "$",
    "%",
    ".",
    "abc",
    "forty two",
    "x = 5",
    "1,23",
    "1,2345",
    "12,34,567",
    "1234,567",
    "0,123",
    ",123",
    "1.2.3",
    "1..2",
    "3/0",
    "3/4/5",
    "3/",
    "/4",
    "--5",
    "-$-5",
    "+-5",
    "2x",
    "2 x",
    "2ab",
    "5/x",
    "5/m",
    "5/ab",
    "5-fold",
    "3!",
    r"2\pi",
    "2 pi",
    "3^2",
    "3 to 4",
    "3-4",
    "3–4",
    "3 or 4",
    "3 hours and 20 minutes",
    "3 and a half",
    "1 half",
    "3 millions",
    "2 dozen eggs",
    "3 million thousand",
    "7:30",
    "1 000",
    "1e",
    "1e5x",
    "1e401",
    "1e99999999999",
    "1e1.5",
    "2 a",
    "1101_2",
    "(1, 2)",
    "about 42",
    "inf",
    "nan",
    "٤٢",
    "9" * 5000,
]


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers(text):
    assert parse_number(text) == NUMBERS[text]
    assert isinstance(parse_number(text), Fraction)


@pytest.mark.parametrize("text", NOT_NUMBERS)
def test_what_is_not_plainly_one_number(text):
    assert parse_number(text) is None


WRAPPINGS = ["{}", " {} ", "{}.", "{}%", "{} apples", "{} miles per hour.", "${}$", "{}\n"]


@given(st.integers(-(10**30), 10**30), st.sampled_from(WRAPPINGS), st.sampled_from("d,"))
def test_integers_in_any_format_parse_back(value, wrapping, style):
    text = f"{value:d}" if style == "d" else f"{value:,}"
    assert parse_number(wrapping.format(text)) == value
    assert parse_number(wrapping.format(text.replace("-", "−"))) == value
    assert parse_number(wrapping.format(text.replace("-", "-$"))) == value
    assert exact_match(wrapping.format(text), str(value))
    assert not exact_match(wrapping.format(text), str(value + 1))


decimals = st.decimals(-(10**12), 10**12, allow_nan=False, allow_infinity=False, places=6)


@given(decimals, st.sampled_from(WRAPPINGS), st.integers(6, 9), st.sampled_from(["", ","]))
def test_decimals_in_any_format_parse_back(value, wrapping, places, separator):
    text = format(value, f"{separator}.{places}f")
    assert parse_number(wrapping.format(text)) == Fraction(value)


@given(st.integers(-999, 999), st.integers(1, 999), st.sampled_from(["/", " / "]))
def test_fractions_parse_back(top, bottom, bar):
    assert parse_number(f"{top}{bar}{bottom}") == Fraction(top, bottom)
    sign = "-" if top < 0 else ""
    assert exact_match(rf"{sign}\dfrac{{{abs(top)}}}{{{bottom}}}", f"{top}/{bottom}")


@given(st.text(max_size=60))
def test_any_text_has_a_value_or_none(text):
    value = parse_number(text)
    assert value is None or isinstance(value, Fraction)
    assert exact_match(text, text) == (normalise_math(bare_answer(text)) != "")


@given(st.integers(0, 10**9), st.integers(1, 2))
def test_a_misplaced_separator_has_no_value(value, digits):
    assert parse_number(f"{value},{'1' * digits}") is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is: 42", "42"),
        ("The answer is:42", "42"),
        ("a. The answer is: 1\nb. The answer is: 2\n", "2"),
        ("The answer is: 7\n\n### Instruction:\nNext, 8", "7"),
        ("The answer is:\n 7 apples \n", "7 apples"),
        ("The answer is:\n\\[\n7\n\\]", "7"),
        ("The answer is: \\frac{1}\n{2}\nand", "\\frac{1}"),
        ("The answer is: {1,\n2}\nand", "{1, 2}"),
        (
            "The answer is: \\begin{pmatrix}1\\\\\n2\\end{pmatrix}.\nSo",
            "\\begin{pmatrix}1\\\\ 2\\end{pmatrix}.",
        ),
        ("The answer is 42", None),
        ("the answer is: 42", None),
        ("It is 42.", None),
        ("The answer is: 1. The answer is:", None),
        ("The answer is: \n", None),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


def test_extract_answer_with_a_marker_of_ones_own():
    assert extract_answer("Answer = 5 Answer = 6", "Answer =") == "6"


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("1,000", "1000"),
        ("$1,000.00", "1000"),
        ("0.75", "3/4"),
        (r"\frac{3}{4}", "0.75"),
        (r"1\frac{1}{2}", "1.5"),
        (r"-\frac12", "-0.5"),
        ("-0", "0"),
        ("42 apples", "42"),
        ("Paris", " Paris ."),
        (r"\text{east}", "east"),
        (r"\left(1, 2\right)", "(1,2)"),
        (r"2\pi", r"2 \pi"),
        (r"x = 5", "5"),
        (r"90^\circ", "90"),
        (r"10,\!080", "10080"),
        (r"\$32,\!348", "32348"),
        (r"5\text{ cm}^2", "5"),
        (r"\(\frac{1}{2}\)", "1/2"),
    ],
)
def test_matches(prediction, gold):
    assert exact_match(prediction, gold)


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        (None, "42"),
        ("", ""),
        ("", "42"),
        ("42", "43"),
        ("4", "42"),
        ("-5", "5"),
        ("1.0000000000000000001", "1"),
        ("3 to 4", "3"),
        ("3 million", "3"),
        ("2x", "2y"),
        ("1 2", "12"),
        ("3!", "3"),
        ("1,23", "123"),
        (r"\frac{1}{3}", "0.333333333"),
        ("(1,2)", "(2,1)"),
        (r"x^{12}", "x^12"),
    ],
)
def test_mismatches(prediction, gold):
    assert not exact_match(prediction, gold)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{5}", "5"),
        (r"\boxed{1} then \boxed{2}.", "2"),
        (r"$\boxed{\frac{1}{\sqrt{2}}}$", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\left\{1, 2\right\}} and {more}", r"\left\{1, 2\right\}"),
        (r"\boxed{\{}", r"\{"),
        (r"\boxed {5}", "5"),
        (r"\boxed 5$ is it", "5"),
        (r"\fbox{7}", "7"),
        (r"\boxed{ 7 }", "7"),
        (r"\boxed{5", None),
        (r"\boxed{1} and \boxed{2", None),
        (r"\boxed", None),
        ("5", None),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"\tfrac12", r"\frac{1}{2}"),
        (r"\frac 1 2", r"\frac{1}{2}"),
        (r"\frac1{72}", r"\frac{1}{72}"),
        (r"\frac{72}1", r"\frac{72}{1}"),
        ("3/4", r"\frac{3}{4}"),
        ("-3/4", r"-\frac{3}{4}"),
        ("x/4", "x/4"),
        (r"\sqrt3", r"\sqrt{3}"),
        (r"\sqrt{13}", r"\sqrt{13}"),
        (r"\left[ 0, 1 \right)", "[0,1)"),
        (r"\leftarrow", r"\leftarrow"),
        (r"\bigl(1\bigr)", "(1)"),
        (r"45^\circ", "45"),
        (r"45^{\circ}", "45"),
        (r"45\degree", "45"),
        ("45°", "45"),
        (r"\$12.50", "12.50"),
        ("$x$", "x"),
        (r"30\%", "30"),
        (r"\text{Monday}", "Monday"),
        (r"\text{(A)}", "(A)"),
        (r"\mathbf{v}", "v"),
        (r"12\text{ inches}", "12"),
        (r"12 \mathrm{cm}^3", "12"),
        (r"12\mbox{ m}.", "12"),
        (r"3 \text{ or } 5", "3,5"),
        ("x = 3", "x=3"),
        ("x=y=3", "x=y=3"),
        (r"x \leq 3", r"x\le3"),
        (r"\neq", r"\ne"),
        (r"a\!b\,c\;d\quad e", "abcde"),
        ("{,}".join(["1", "234"]), "1234"),
        ("1,234,567", "1234567"),
        ("(1,234)", "(1,234)"),
        (".5", "0.5"),
        ("3.5.", "3.5"),
        ("2^{3}", "2^3"),
        ("x_{1}", "x_1"),
        ("2^{10}", "2^{10}"),
        ("a  +\n b", "a+b"),
        ("1 2", "1 2"),
        ("−3", "-3"),
    ],
)
def test_normalise_math(text, normal):
    assert normalise_math(text) == normal
    assert normalise_math(normal) == normal


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        # the order: the marker, ####, the last box, a text that is an answer and nothing else
        (r"\boxed{1} #### 2 The answer is: 3", "3"),
        ("The answer is: 3\n#### 2", "3"),
        (r"\boxed{1}" + "\n#### 2", "2"),
        (r"First \boxed{1}, then \boxed{2}.", "2"),
        ("The answer is:\n", None),
        ("The answer is: \n#### 2", "2"),
        # what is only around it
        (r"The answer is: \boxed{72}.", "72"),
        (r"The answer is: $x = \boxed{72}$", "72"),
        ("The answer is: **72**", "72"),
        ("The answer is: **$72**.", "$72"),
        ("The answer is: `72`", "72"),
        ("The answer is: $72.", "$72"),
        ("The answer is: $72$.", "72"),
        (r"The answer is: \(72\)", "72"),
        ("The answer is: 72 (since 8 times 9 is 72).", "72"),
        ("The answer is: 72 (or 73)", "72 (or 73)"),
        ("The answer is: 3 (million)", "3 (million)"),
        ("The answer is: (1, 2)", "(1, 2)"),
        ("The answer is: 2**10", "2**10"),
        # alone
        ("145.0", "145.0"),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
        ("New York", "New York"),
        ("9 apples", "9 apples"),
        ("?", None),
        ("It is 42.", None),
        ("4 apples were left on the table", None),
        ("4\n5", None),
        ("", None),
    ],
)
def test_read_answer(text, answer):
    assert read_answer(text, "The answer is:") == answer


@given(st.text(max_size=80))
def test_any_text_is_read_or_not(text):
    for found in (read_answer(text), read_answer(f"The answer is:{text}")):
        assert found is None or found
    assert isinstance(bare_answer(text), str)
    assert parts_of(normalise_math(text)).elements


@pytest.mark.parametrize(
    ("text", "brackets", "elements"),
    [
        ("5", "", ("5",)),
        ("(5)", "", ("5",)),
        ("1,2", "", ("1", "2")),
        ("(1,2)", "()", ("1", "2")),
        ("[0,1)", "[)", ("0", "1")),
        (r"\{1,2\}", "{}", ("1", "2")),
        ("{5}", "", ("5",)),
        ("(x+1)(x+2)", "", ("(x+1)(x+2)",)),
        ("(1,2),(3,4)", "", ("(1,2)", "(3,4)")),
        (r"\pm2", "", ("2", "-2")),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "pmatrix 2x2", tuple("1234")),
        (r"\begin{bmatrix}1\\2\end{bmatrix}", "pmatrix 1x1", tuple("12")),
        (r"1,\begin{pmatrix}1,2\end{pmatrix}", "", ("1", r"\begin{pmatrix}1,2\end{pmatrix}")),
        ("(1", "", ("(1",)),
    ],
)
def test_parts(text, brackets, elements):
    assert parts_of(text) == (brackets, elements)


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("5 cm", {"cm"}),
        (r"5\text{ cm}^2", {"cm"}),
        ("60mph", {"mile", "hour"}),
        ("$5", {"$"}),
        ("5 dollars", {"$"}),
        ("50%", {"%"}),
        (r"90^\circ", {"degree"}),
        ("7:30 p.m.", {"pm"}),
        ("72 apples", set()),
        ("72", set()),
        ("east", set()),
        (r"\frac{1}{2}", set()),
    ],
)
def test_units(text, units):
    assert units_of(text) == units
