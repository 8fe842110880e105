"""The schema of a run with the keys of everything that is registered."""

import functools
import inspect
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import Field, create_model, model_validator

from balora_jax.config import RegularizersConfig, RunConfig, Section
from balora_jax.errors import InputError
from balora_jax.numerics.objective import objective_of
from balora_jax.numerics.schedules import SCHEDULES
from balora_jax.numerics.terms import TERMS, keys_of, settings_of
from balora_jax.numerics.terms.term import Term, names_of, schedules_of

Key = tuple[Any, Any]
"""Type and field of a key, as pydantic takes them."""


def run_schema() -> type[RunConfig]:
    """:class:`RunConfig` with the keys of every term that is registered now.

    Its fields hold each key's type, default and description.

    Raises:
        InputError: a registered term wants a key that the section has.

    >>> list(run_schema().model_fields["regularizers"].annotation.model_fields)[:4]
    ['variant', 'consistency', 'diversity', 'spectral']
    """
    return _schema_of(TERMS.values(), SCHEDULES.values())


@functools.cache
def _schema_of(terms: tuple[Term, ...], schedules: tuple[Any, ...]) -> type[RunConfig]:
    del schedules  # read through the terms
    section = _section_of(terms)
    return create_model(
        "RunConfig",
        __base__=RunConfig,
        __doc__=RunConfig.__doc__,
        regularizers=(section, section()),
    )


def _section_of(terms: tuple[Term, ...]) -> type[RegularizersConfig]:
    own = RegularizersConfig.model_fields
    taken = [(term, key) for term in terms for key in keys_of(term) if key in own]
    if taken:
        term, key = taken[0]
        raise InputError(
            f"term {term.name}: expected keys of its own, got {key!r}, which the section "
            "regularizers has already. Choose another name."
        )
    keys: dict[str, Key] = {"variant": (own["variant"].annotation, own["variant"])}
    for number, term in enumerate(terms, start=1):
        keys[term.name] = _weight(term, number)
    keys |= _settings(terms, late=False)
    for number, term in enumerate(terms, start=1):
        keys[f"{term.name}_schedule"] = _schedule(term, number)
    keys["warmup_fraction"] = (own["warmup_fraction"].annotation, own["warmup_fraction"])
    keys |= _settings(terms, late=True)
    # Keys come in the order of the first class that has them, and what is typed from the second.
    ordered: Any = create_model("Terms", __base__=Section, **keys)  # type: ignore[call-overload]

    class Regularizers(RegularizersConfig, ordered):
        @model_validator(mode="after")
        def _objective(self) -> "Regularizers":
            objective_of(self.of_the_terms())  # raises where a value is out of range
            return self

    # Without indentation, as Python 3.13 has it from the source.
    lines = (f"    {k}: {ordered.model_fields[k].description}" for k in keys if k not in own)
    Regularizers.__doc__ = "\n".join([inspect.cleandoc(RegularizersConfig.__doc__ or ""), *lines])
    return Regularizers


def _weight(term: Term, number: int) -> Key:
    says = f"λ{number}; 0 leaves the term out of the program."
    return Annotated[float, Field(ge=0.0)], Field(term.weight, description=says)


def _schedule(term: Term, number: int) -> Key:
    named = Literal[tuple(names_of(schedules_of(term)))]  # type: ignore[valid-type]
    return named, Field(term.schedule, description=f"of λ{number} over the run.")


def _settings(terms: tuple[Term, ...], *, late: bool) -> dict[str, Key]:
    """The settings of the terms; those that a variant decides are None where not given."""
    found: dict[str, Key] = {}
    for term in terms:
        hints = get_type_hints(type(term))
        by_form = {name for form in (*term.variants.values(), term.for_labels) for name in form}
        for field in settings_of(term):
            if field.metadata.get("late", False) != late:
                continue
            hint, default = hints[field.name], getattr(term, field.name)
            if field.name in by_form:
                hint, default = hint | None, None
            says = field.metadata.get("says", "a setting of the term.")
            found[field.name] = hint, Field(default, description=f"{says}")
    return found
