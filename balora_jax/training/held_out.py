"""Measurements of held-out rows while a run trains: the best of them, and when to stop."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from balora_jax.config import EvalConfig, TrainingConfig
from balora_jax.io.metrics import LOSS, SCORE, VALIDATION
from balora_jax.parallel import hosts
from balora_jax.training.run import Arrays, Validator

Figures = dict[str, float | None]


class HeldOut:
    """What a run knows of its held-out rows, and what follows from it.

    Args:
        config: the section ``eval``.
        training: the section ``training``.
        validator: measures the loss and the terms; None where that is not asked for.
        total_steps: of the whole run, at whose end everything is measured.
        adapters: the trainable arrays at step 0.

    Attributes:
        before: the loss and the terms at step 0, by their names in the log; empty until measured.
        best: of the figure that decides: ``step``, ``value``, ``skipped`` updates until then, and
            all ``figures`` of that step; None until one was measured.
        without_gain: measurements since the best that were no better.
        kept: copies of the trainable arrays at the best step; None where they are not to be kept.
        validated: step and figures of the last measurement of the loss.
    """

    def __init__(
        self,
        config: EvalConfig,
        training: TrainingConfig,
        validator: Validator | None,
        total_steps: int,
        adapters: Arrays,
    ):
        self.every, self.score_every = config.every, config.score_every
        self.total_steps, self.validator = total_steps, validator
        self.patience = training.patience
        self.metric = training.keep_best or (LOSS if training.patience else None)
        self.before: Figures = {}
        self.best: dict[str, Any] | None = None
        self.without_gain = 0
        self.kept = copied(adapters) if training.keep_best else None
        self.validated: tuple[int, Figures] = (-1, {})

    @property
    def is_on(self) -> bool:
        """Whether anything is measured while the run trains."""
        return self.validator is not None or self.score_every > 0

    @property
    def exhausted(self) -> bool:
        """Whether the run stops, as too many measurements brought nothing better."""
        return self.patience is not None and self.without_gain >= self.patience

    def due(self, step: int) -> bool:
        """Whether something is to be measured after a step."""
        return self._due(self.every, step) or self._due(self.score_every, step)

    def _due(self, every: int, step: int) -> bool:
        return every > 0 and (step % every == 0 or step == self.total_steps)

    def begin(self, constants: Any, adapters: Arrays) -> None:
        """Measure the start."""
        self.before = self._validate("before", constants, adapters)

    def measure(
        self,
        step: int,
        constants: Any,
        adapters: Arrays,
        score: Callable[[str], dict[str, Any]],
    ) -> Figures:
        """The figures that are due after a step, for its row of the log; printed as well.

        To be called by all processes, which all get those of the first.
        """
        title, found = f"step {step}", Figures()
        if self._due(self.every, step):
            found |= self.validate(step, title, constants, adapters)
        if self._due(self.score_every, step):
            figures = hosts.from_first(score(title))
            numbers = {k: v for k, v in figures.items() if not isinstance(v, str)}
            found |= {SCORE + name: _finite(value) for name, value in numbers.items()}
        return found

    def validate(self, step: int, title: str, constants: Any, adapters: Arrays) -> Figures:
        """The loss and the terms after a step, measured once for a step; empty without rows."""
        if self.validated[0] != step:
            self.validated = (step, self._validate(title, constants, adapters))
        return self.validated[1]

    def _validate(self, title: str, constants: Any, adapters: Arrays) -> Figures:
        if self.validator is None:
            return {}
        found = hosts.from_first(self.validator(constants, adapters))
        said = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in found.items())
        hosts.say(f"{title}: validation {said}")
        return {VALIDATION + name: _finite(value) for name, value in found.items()}

    def compare(self, step: int, figures: Figures, adapters: Arrays, skipped: int) -> bool:
        """Whether the figures of a step are the best so far, which are then kept.

        Args:
            step: after which they were measured.
            figures: as :meth:`measure` gives them.
            adapters: the trainable arrays after that step.
            skipped: updates skipped until then.
        """
        if self.metric is None or self.metric not in figures:
            return False
        value = figures[self.metric]
        if value is None or (self.best is not None and not self._better(value)):
            self.without_gain += 1
            return False
        self.best = {"step": step, "value": value, "skipped": skipped, "figures": figures}
        self.without_gain = 0
        if self.kept is not None:
            self.kept = copied(adapters)
        return True

    def _better(self, value: float) -> bool:
        assert self.best is not None
        assert self.metric is not None
        best = self.best["value"]
        return value > best if self.metric.startswith(SCORE) else value < best

    def ending(self, step: int) -> str:
        """What is said of a run that stops early."""
        assert self.metric is not None
        best = "none was finite"
        if self.best is not None:
            best = f"the best was {self.best['value']:.4f} after step {self.best['step']}"
        return (
            f"stopped early after step {step}: {self.without_gain} measurements without a better "
            f"{self.metric.replace('_', ' ')}; {best}"
        )

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the arrays, as plain JSON values."""
        return {"before": self.before, "best": self.best, "without_gain": self.without_gain}

    def set_state(self, state: Mapping[str, Any], kept: Arrays | None) -> None:
        """Go on from a checkpoint with its copies of the best arrays."""
        self.before, self.best = state["before"], state["best"]
        self.without_gain, self.kept = state["without_gain"], kept

    def summary(self, after: Figures) -> dict[str, Any]:
        """What ``summary.json`` says of the measurements; ``after`` are those of the end."""
        said: dict[str, Any] = {}
        if self.validator is not None:
            said = {"before": self.before, "after": after}
        if self.best is not None:
            best = {name: self.best[name] for name in ("step", "value")}
            said["best"] = {"metric": self.metric, **best, **self.best["figures"]}
        found = {"validation": said} if said else {}
        return found if self.patience is None else found | {"stopped_early": self.exhausted}


def copied(arrays: Arrays) -> Arrays:
    """Copies that lie as the arrays do: a step gives its own away."""
    return jax.tree.map(jnp.copy, arrays)


def _finite(value: float) -> float | None:
    """A number as JSON knows it: None where it is not finite."""
    return value if math.isfinite(value) else None
