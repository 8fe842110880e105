"""JSON files of others: values, or one sentence."""

import json
import os

import pytest

from balora_jax.errors import InputError
from balora_jax.untyped.json_text import DEEPEST, read_object

REFUSED = {
    "nothing": (b"", "expected JSON, got Expecting value"),
    "cut": (b'{"a": 1', "expected JSON, got"),
    "no UTF-8": (b'{"a": "\xff"}', "expected JSON, got 'utf-8' codec"),
    "a list": (b"[1]", "expected a JSON object, got list"),
    "null": (b"null", "expected a JSON object, got NoneType"),
    "deep": (b'{"a":' * 100_000, f"nested at most {DEEPEST} levels deep"),
    "deep lists": (b"[" * 100_000 + b"]" * 100_000, f"nested at most {DEEPEST} levels deep"),
    "a little too deep": (
        b'{"a":' + b"[" * DEEPEST + b"]" * DEEPEST + b"}",
        f"nested at most {DEEPEST} levels deep",
    ),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", "expected JSON, got Exceeds the limit"),
    "twice": (b'{"a": {"r": 1, "r": 2}}', "got the key 'r' twice, with two values"),
    "a long key twice": (b'{"%s": 1, "%s": 2}' % (b"k" * 10**5, b"k" * 10**5), "twice"),
    "escapes": (b'{"\\u001b[2J\\n": 1, "\\u001b[2J\\n": 2}', r"the key '\x1b[2J\n' twice"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_object_is_refused(tmp_path, name):
    content, message = REFUSED[name]
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_object(file)
    assert str(error.value).startswith(f"{file}: expected")
    assert message in str(error.value)
    assert len(str(error.value)) < 400 + len(str(file))
    assert str(error.value).isprintable()


def test_files_that_are_none(tmp_path):
    with pytest.raises(InputError, match=r"a\.json: expected a readable file, got No such file"):
        read_object(tmp_path / "a.json")
    with pytest.raises(InputError, match="expected a file, got something else"):
        read_object(tmp_path)
    os.mkfifo(tmp_path / "pipe.json")  # which nobody writes to
    with pytest.raises(InputError, match="expected a file, got something else"):
        read_object(tmp_path / "pipe.json")
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    with pytest.raises(InputError, match="expected a readable file, got Too many levels"):
        read_object(tmp_path / "loop.json")
    with pytest.raises(InputError, match="expected a readable file, got File name too long"):
        read_object(tmp_path / ("x" * 300))


def test_a_file_beyond_the_limit(tmp_path):
    file = tmp_path / "config.json"
    with file.open("wb") as stream:
        stream.truncate(2**40)  # of no blocks
    with pytest.raises(InputError, match="expected at most 64 MiB of JSON, got more"):
        read_object(file)


def test_what_is_well(tmp_path):
    value = {"a": [1, {"b": None}], "c": "ü\n", "d": 1e-5, "e": 10**30, "f": True}
    file = tmp_path / "a.json"
    file.write_text(json.dumps(value), encoding="utf-8")
    assert read_object(file) == value
    file.write_text('{"a": 1, "b": {"c": 2}, "a": 1}')  # twice, with one value
    assert read_object(file) == {"a": 1, "b": {"c": 2}}
    file.write_text('{"a": ' + "[" * (DEEPEST - 1) + "]" * (DEEPEST - 1) + "}")
    assert list(read_object(file)) == ["a"]
