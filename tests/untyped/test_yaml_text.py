"""YAML texts: values, or one sentence with the line."""

import os

import pytest
import yaml

from balora_jax.errors import InputError
from balora_jax.untyped.yaml_text import parse_yaml, read_yaml


def bomb(first, level):
    return f"a0: &a0 {first}\n" + "\n".join(
        f"a{i}: &a{i} {level.replace('*', f'*a{i - 1}')}" for i in range(1, 40)
    )


REFUSED = {
    "tag int": ("a: 1\nb: !!int x", "'x' where 'int' was expected in line 2"),
    "tag int of nothing": ("a: !!int ''", "'' where 'int' was expected in line 1"),
    "tag bool": ("a: !!bool x", "'x' where 'bool' was expected in line 1"),
    "tag float": ("a: !!float x", "'x' where 'float' was expected in line 1"),
    "tag timestamp": ("a: !!timestamp x", "'x' where 'timestamp' was expected in line 1"),
    "date": ("a:\n  b: 2024-13-45", "'2024-13-45' where 'timestamp' was expected in line 2"),
    "digits": ("a: " + "9" * 5000, "where 'int' was expected in line 1"),
    "binary": ("a: !!binary é", "failed to convert base64 data"),
    "tag of Python": ("a: !!python/object:os.system x", "could not determine a constructor"),
    "own tag": ("a: !b x", "could not determine a constructor for the tag '!b' in line 1"),
    "list as text": ("a: !!str [1]", "expected a scalar node, but found sequence in line 1"),
    "key twice": ("a: 1\nb: 2\na: 3", "the key 'a' twice in line 3"),
    "key twice below": ("a: {b: 1, b: 1}", "the key 'b' twice in line 1"),
    "section twice": ("a:\n  b: 1\nc: 1\na:\n  d: 1", "the key 'a' twice in line 4"),
    "key twice in quotes": ("a: 1\n'a': 2", "the key 'a' twice in line 2"),
    "merge twice": ("a: &a {x: 1}\nb:\n  <<: *a\n  <<: *a", "the key '<<' twice in line 4"),
    "list as a key": ("? [a]\n: b", "found unhashable key in line 1"),
    "no alias": ("a: *b", "found undefined alias 'b' in line 1"),
    "holds itself": ("a: &a [1, *a]", "an alias of what it stands in in line 1"),
    "holds itself as a section": ("&a a: 1\nb: &b {c: *b}", "an alias of what it stands in"),
    "deep flow": ("[" * 100_000, "more than 50 levels"),
    "deep sections": ("\n".join(" " * i + "a:" for i in range(200)), "in line 50"),
    "bomb of lists": (bomb("[1, 2, 3]", "[*, *, *, *, *, *, *, *, *]"), "or 20000 values"),
    "bomb of sections": (bomb("{x: 1}", "{a: *, b: *, c: *}"), "or 20000 values"),
    "bomb of merges": (bomb("{x: 1}", "{<<: [*, *]}"), "or 20000 values"),
    "chain": (bomb("[1]", "[[*]]"), "more than 50 levels"),
    "two documents": ("a: 1\n---\nb: 2", "but found another document in line 2"),
    "version": ("%YAML 9.9\n---\na: 1", "found incompatible YAML document"),
    "NUL": ("a: \0", "unacceptable character #x0000"),
    "escapes": ('"\\e[2J\\n": 1\n"\\e[2J\\n": 2', r"the key '\x1b[2J\n' twice"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_yaml_is_refused(name):
    text, message = REFUSED[name]
    with pytest.raises(InputError) as error:
        parse_yaml(text, "run.yaml: expected YAML", "Correct the file.")
    said = str(error.value)
    assert said.startswith("run.yaml: expected YAML, got: ")
    assert said.endswith(". Correct the file.")
    assert message in said
    assert len(said) < 300
    assert said.isprintable()


def test_many_values_are_refused_before_all_are_read():
    text = "[" + "1," * 500_000 + "]"
    with pytest.raises(InputError, match="20000 values"):
        parse_yaml(text, "a: expected YAML", "Correct it.")


SAME = (
    "",
    "a: 1\nb: [x, 2.5, null, true, 2024-01-31]\nc: {d: 'e'}",
    "a: &a {x: 1}\nb: {<<: *a, x: 2}\nc: {<<: *a, <: 1}",
    "a: &a [1]\nb: [*a, *a]",
    "!!set {a, b}",
    "- !!omap [a: 1]\n- !!binary aGk=",
    "1: a\n2: b",
)


@pytest.mark.parametrize("text", SAME)
def test_the_rest_is_what_the_safe_loader_makes(text):
    assert parse_yaml(text, "a", "b") == yaml.safe_load(text)


def test_files(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("a: ü", encoding="utf-8")
    assert read_yaml(file) == {"a": "ü"}
    file.write_bytes(b"a: \xff")
    with pytest.raises(InputError, match=r"run.yaml: expected YAML, got: 'utf-8' codec"):
        read_yaml(file)
    with file.open("wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(InputError, match="expected at most 1024 KiB of YAML, got more"):
        read_yaml(file)
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(InputError, match="expected a file, got something else"):
            read_yaml(other)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("[no, yes]", ["no", "yes"]),
        ("[false, True]", ["false", "True"]),
        ("[on, OFF, y]", ["on", "OFF", "y"]),
        ("[0, 01, 1_000, 0x1F, 12:30]", ["0", "01", "1_000", "0x1F", "12:30"]),
        ("[1.0, 1e3, .5, .inf]", ["1.0", "1e3", ".5", ".inf"]),
        ("[2024-01-05]", ["2024-01-05"]),
        ("['no', \"1\"]", ["no", "1"]),
        ("\n- no\n- yes", ["no", "yes"]),
        ("no", "no"),
        ("[a, ~]", ["a", None]),
    ],
)
def test_names_are_the_words_that_stand_there(words, names):
    """YAML 1.1 would make truth values, numbers in three bases and days of them."""
    for key in ("labels", "label_column", "text_columns"):
        assert parse_yaml(f"data:\n  {key}: {words}".replace("\n-", "\n  -"), "", "") == {
            "data": {key: names}
        }
        assert parse_yaml(words, "", "", key) == names
    assert parse_yaml("{split: no, rank: 01, labels_: [no]}", "", "") == {
        "split": False,
        "rank": 1,
        "labels_": [False],
    }
