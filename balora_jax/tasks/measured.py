"""The figures of held-out rows that a run can be measured by, and what it refuses."""

from collections.abc import Sequence

from balora_jax.config import EvalConfig, TrainingConfig
from balora_jax.errors import InputError
from balora_jax.io.metrics import LOSS, SCORE, VALIDATION


def check_measured(
    config: EvalConfig,
    training: TrainingConfig,
    *,
    rows: bool,
    losses: Sequence[str],
    scores: Sequence[str],
    shown: bool = False,
) -> None:
    """See that what is measured while a run trains can be measured.

    Args:
        config: the section ``eval``.
        training: the section ``training``.
        rows: whether there are validation rows.
        losses: the loss, the terms that are on, and what else is computed of them.
        scores: figures of the score; none where nothing is scored.
        shown: answers are shown at a score, whether it has figures or not.

    Raises:
        InputError: no rows, no score, an unknown figure, or one that is never measured.
    """
    if config.every and not rows:
        raise InputError(
            "eval.every: expected rows in data.validation beside it, got none. Name a file there, "
            "or leave it out."
        )
    if config.score_every and not (scores or shown):
        raise InputError(
            "eval.score_every: expected a score of validation rows, got none. Name a file in "
            "data.validation and a task in eval.task, ask eval.prompts, or leave it out."
        )
    known = [*(VALIDATION + name for name in losses), *(SCORE + name for name in scores)]
    if training.keep_best is not None and training.keep_best not in known:
        raise InputError(
            f"training.keep_best: expected one of {', '.join(known)}, got "
            f"{training.keep_best!r}. Choose one of them."
        )
    figure = training.keep_best or (LOSS if training.patience else None)
    if figure is None:
        return
    key, steps = "every", config.every
    if figure.startswith(SCORE):
        key, steps = "score_every", config.score_every
    if not steps:
        where = "keep_best" if training.keep_best else "patience"
        raise InputError(
            f"training.{where}: expected eval.{key} beside it, the steps between two measurements "
            f"of {figure}, got 0. Set it."
        )
