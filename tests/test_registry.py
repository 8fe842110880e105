"""Registries: what they hold by name, and the message for a name that they lack."""

from typing import NamedTuple

import pytest

from balora_jax.errors import InputError
from balora_jax.registry import Registry


class Tracker(NamedTuple):
    name: str


def message(registry, name):
    with pytest.raises(InputError) as error:
        registry[name]
    return str(error.value)


def test_an_unknown_name_is_refused_with_those_there_are():
    trackers = Registry("tracker", "training.trackers")
    assert message(trackers, "table") == (
        "training.trackers: expected a tracker, got 'table', but there is none registered. "
        "Register one in a file under extensions."
    )
    trackers.register(Tracker("table"))
    trackers.register(Tracker("journal"))
    assert message(trackers, "tabel") == (
        "training.trackers: expected a tracker, one of table, journal, got 'tabel'. "
        "Did you mean 'table'?"
    )
    assert message(trackers, "x").endswith("got 'x'. Choose one of them.")
    assert trackers["journal"] == Tracker("journal")
