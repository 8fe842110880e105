"""What a run says about single rows: every prediction of a score, and answers to watch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from balora_jax.io import row_files
from balora_jax.parallel import hosts
from balora_jax.training.run import Scored
from balora_jax.training.workdir import PREDICTION, PREDICTIONS, SAMPLES, predictions_of
from balora_jax.untyped.shown import one_line

_WIDTH = 160
"""Most characters of a prompt or an answer on screen."""

Row = Mapping[str, Any]


class Records:
    """Writes of a run's folder ``predictions/`` and ``samples.jsonl``, by the first process.

    Nothing is written before the run has begun: what comes earlier waits.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._begun = False
        self._waiting: list[tuple[str, int, Scored]] = []

    def begin(self, start: int) -> None:
        """Forget what is of steps after ``start``, which come again, and write what waited."""
        self._begun = True
        if hosts.is_first():
            for file in predictions_of(self._folder):
                found = PREDICTION.fullmatch(file.name)
                if found and found[2] and int(found[2]) > start:
                    file.unlink()
            row_files.replace(self._folder / SAMPLES, lambda step: step > start, [])
        for waiting in self._waiting:
            self.keep(*waiting)

    def keep(self, title: str, step: int, found: Scored) -> None:
        """Write what a score found, in place of what the same score found before.

        Args:
            title: ``before``, ``after`` or ``step N``.
            step: of the weights.
            found: predictions and samples of it.
        """
        if not self._begun:
            self._waiting.append((title, step, found))
            return
        if not hosts.is_first():
            return
        if found.predictions:
            folder = self._folder / PREDICTIONS
            folder.mkdir(exist_ok=True)
            file = folder / f"{title.replace(' ', '_')}.jsonl"
            row_files.write(file, found.predictions)
        if found.samples:
            rows = [{"step": step, **row} for row in found.samples]
            row_files.replace(self._folder / SAMPLES, lambda other: other == step, rows)
            if title != "after":  # then it is shown beside the first
                print("\n".join(_said(f"samples, {title}", rows)), flush=True)


def beside_each_other(folder: Path) -> list[str]:
    """Lines about the samples of a run: each prompt with its first answer and its last."""
    file = folder / SAMPLES
    rows = row_files.read(file)
    steps = sorted({row["step"] for row in rows})
    if not steps:
        return []
    first, last = ([row for row in rows if row["step"] == of] for of in (steps[0], steps[-1]))
    answers: dict[str, list[Row]] = {}
    for row in (*first, *(last if len(steps) > 1 else [])):
        answers.setdefault(str(row.get("prompt")), []).append(row)
    said = [f"samples, all in {file}"]
    for prompt, found in answers.items():
        said.append(f"  {_short(prompt)}")
        said += [f"    step {row['step']}: {_short(row.get('answer'))}" for row in found]
        if found[-1].get("gold") is not None:
            said.append(f"    right: {_short(found[-1]['gold'])}")
    return said


def _said(title: str, rows: Sequence[Row]) -> list[str]:
    """Lines that show prompts and answers."""
    pairs = [f"  {_short(row['prompt'])}\n    {_short(row['answer'])}" for row in rows]
    return [title, *pairs]


def _short(text: Any) -> str:
    return one_line(" ".join(str(text).split()), _WIDTH)
