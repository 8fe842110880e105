"""The teacher of a run: the pretrained model, or the model as it starts to train."""

from collections.abc import Mapping

import jax.numpy as jnp

from balora_jax.array_types import Array
from balora_jax.config import RegularizersConfig
from balora_jax.models.decoder_config import EMBEDDING
from balora_jax.models.structure import Structure
from balora_jax.models.whole import TOKEN_ROWS
from balora_jax.numerics.objective import Objective
from balora_jax.training.adapters import Adapters

Arrays = dict[str, Array]


def is_the_start(config: RegularizersConfig, adapters: Adapters) -> bool:
    """Whether the teacher has arrays of its own: those of the adapter that the run starts from.

    Adapters that start anew leave the base what it is, so that there both teachers are one.
    """
    return config.teacher == "start" and adapters.leaves_base


def kept(student: Structure, trainable: Mapping[str, Array]) -> Arrays:
    """Copies of what trains at step 0, in the dtype that the model binds; the step is given those.

    Args:
        student: the structure that they are bound to.
        trainable: float32.
    """
    return {
        path: jnp.array(value, held_dtype(student, path), copy=True)
        for path, value in trainable.items()
    }


def held_dtype(student: Structure, path: str) -> jnp.dtype:
    """The dtype of a trainable array once it is bound: the frozen weight's whose place it takes."""
    place = EMBEDDING if path == TOKEN_ROWS else path
    return student.frozen[place].dtype if place in student.frozen else jnp.dtype(jnp.float32)


def remarks(
    config: RegularizersConfig, adapters: Adapters, objective: Objective, *, trained_head: bool
) -> list[str]:
    """What a reader should know of the teacher before they trust the numbers.

    Args:
        config: the section ``regularizers``.
        adapters: where the run starts.
        objective: what it computes.
        trained_head: the start brings an encoder's head.
    """
    if not objective.needs_teacher:
        asked = {
            "teacher: start": config.teacher == "start",
            "teacher_cache: true": config.teacher_cache is True,
            "teacher_fraction": config.teacher_fraction < 1,
        }
        return [_UNREAD.format(key) for key, is_asked in asked.items() if is_asked]
    if trained_head and config.teacher == "base":
        return [_APART]
    return []


_UNREAD = "note: regularizers.{} is not read, as no term that compares with a teacher has a weight."
_APART = (
    "note: the adapter of adapter.start brings its trained head, and regularizers.teacher: base "
    "puts that head on the encoder without the adapter, so that consistency does not begin at 0. "
    "Set regularizers.teacher to start for the model as it starts to train."
)
