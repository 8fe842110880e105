"""Which runs may go on to more steps or epochs than they began with."""

import pytest

from balora_jax.errors import InputError
from balora_jax.io.checkpoint import Identity, check_same_run, extension


def identity(*, steps=None, epochs=None, schedule="constant", warmup=0.0):
    training = {"max_steps": steps, "epochs": epochs, "schedule": schedule, "warmup": warmup}
    return Identity({"training": training, "regularizers": {}}, "base", "")


@pytest.mark.parametrize(
    ("length", "more"), [({"steps": 4}, {"steps": 9}), ({"epochs": 1.0}, {"epochs": 1.5})]
)
def test_more_steps_or_epochs(length, more):
    saved, now = identity(**length), identity(**more)
    check_same_run(saved, now, "run")
    ((key, before), (_, after)) = *length.items(), *more.items()
    key = "max_steps" if key == "steps" else key
    assert extension(saved, now) == [f"the run is longer: training.{key} {before} -> {after}"]
    assert extension(saved, saved) == []


@pytest.mark.parametrize("extend", [False, True])
@pytest.mark.parametrize(
    ("length", "other", "said"),
    [
        ({"steps": 9}, {"steps": 4}, "expected training.max_steps to stay 9, got 4. Set it back"),
        ({"epochs": 2.0}, {"epochs": 1.0}, "expected training.epochs to stay 2.0, got 1.0. Set"),
        ({"steps": 4}, {"epochs": 9.0}, "expected training.epochs to stay None, got 9.0. Set it"),
    ],
)
def test_never_fewer_and_never_in_another_unit(length, other, said, extend):
    with pytest.raises(InputError, match=said):
        check_same_run(identity(**length), identity(**other), "run", extend=extend)


@pytest.mark.parametrize("bound", [{"schedule": "linear"}, {"warmup": 0.03}])
def test_schedules_of_the_length_must_be_asked_for(bound):
    saved = identity(epochs=1.0, **bound)
    ((key, value),) = bound.items()
    with pytest.raises(InputError, match=f"This changes training.{key} {value}, which follow"):
        check_same_run(saved, identity(epochs=2.0, **bound), "run")
    now = identity(epochs=2.0, **bound)
    check_same_run(saved, now, "run", extend=True)
    assert extension(saved, now)[0].endswith(f"over the new length now: training.{key} {value}")
