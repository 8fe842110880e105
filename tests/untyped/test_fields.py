"""Typed readers over a parsed object; those of a config.json are tested with the families."""

import pytest

from balora_jax.errors import InputError
from balora_jax.untyped.fields import Fields


def fields(value):
    return Fields({"k": value}, "a.json", "Mend it.")


@pytest.mark.parametrize(
    "value",
    ["x", True, [True], ["a"], [None], {"a": 1}, 1.5, -1, [-1], 100, [3, 100], [[2]], 10**30],
)
def test_no_whole_numbers(value):
    with pytest.raises(InputError) as error:
        fields(value).integers("k", most=99)
    assert str(error.value) == (
        f"a.json: expected k to be whole numbers from 0 to 99, got {value!r}. Mend it."
    )


def test_whole_numbers():
    assert fields(None).integers("k", most=9) == Fields({}, "").integers("k", most=9) == ()
    assert fields(7).integers("k", most=9) == (7,)
    assert fields([0, 9]).integers("k", most=9) == (0, 9)


@pytest.mark.parametrize("value", [10**400, float("nan"), float("inf"), "1", True, None, -1])
def test_no_number(value):
    with pytest.raises(InputError, match=r"a\.json: expected "):
        fields(value).number("k")


@pytest.mark.parametrize("value", [7, "ab", [7], ["a", ""], {"a": "b"}, [["a"]]])
def test_no_names(value):
    with pytest.raises(InputError, match="expected k to be a list of names, got"):
        fields(value).texts("k")


@pytest.mark.parametrize("value", [7, [1], {"a": "x"}, {"a": None}, {"a": 0}, {"a": True}])
def test_no_numbers_by_name(value):
    with pytest.raises(InputError, match="expected k to be an object"):
        fields(value).numbers("k", least=1)


def test_whole_numbers_by_name():
    assert fields({"a": 2}).numbers("k", whole=True) == {"a": 2}
    with pytest.raises(
        InputError, match=r"an object of a whole number of at least 0, got {'a': 2.5}"
    ):
        fields({"a": 2.5}).numbers("k", whole=True)
