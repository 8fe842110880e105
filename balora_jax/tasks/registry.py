"""The tasks by name: whatever depends on a run's task asks its object here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from balora_jax.config import RunConfig
from balora_jax.registry import Registry
from balora_jax.tasks.labels import run as labels_run
from balora_jax.tasks.text import run as text_run
from balora_jax.tasks.text.chat import Chat
from balora_jax.training.run import Run, Scored


@dataclass(frozen=True)
class Task:
    """Task that a run can be asked to learn.

    Attributes:
        name: what configs call it under ``task``.
        model: kind of its pretrained models.
        check: opens and checks everything a run reads, short of loading the weights.
        evaluate: ``(config, adapter=…)`` → figures of a base model or of an adapter on it, with
            the prediction of each row.
        generate: ``(config, prompts, adapter=…, raw=…)`` → texts; None where models write none.
        chat: ``(config, adapter=…, compare=…, system=…)`` → a conversation; None as there.
    """

    name: str
    model: Literal["decoder", "encoder"]
    check: Callable[[RunConfig], Run]
    evaluate: Callable[..., Scored]
    generate: Callable[..., list[str]] | None = None
    chat: Callable[..., Chat] | None = None


TASKS: Registry[Task] = Registry("task", "task")

TASKS.register(
    Task("text", "decoder", text_run.check, text_run.evaluate, text_run.generate, text_run.chat)
)
TASKS.register(Task("labels", "encoder", labels_run.check, labels_run.evaluate))
