"""The score of an encoder on rows with labels, during a run and on its own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from balora_jax.array_types import Array, PRNGKeyArray
from balora_jax.config import DataConfig, EvalConfig
from balora_jax.data.glue import LabelsTask, custom_task, glue_task
from balora_jax.data.labels import (
    LabelsExample,
    LabelsSet,
    labels_epoch,
    padded_length,
)
from balora_jax.data.layout import LENGTH_MULTIPLE
from balora_jax.data.sources import load_rows
from balora_jax.evals.classification import score_labels
from balora_jax.models.encoder import Encoder
from balora_jax.numerics.few import batches_by_length
from balora_jax.parallel import hosts, sharding
from balora_jax.parallel.sharding import rows_sharding
from balora_jax.progress import progress_bar
from balora_jax.tasks.labels.loss import Constants
from balora_jax.training.run import Scored

Arrays = dict[str, Array]


SHOW_PROGRESS_ABOVE = 500
NAMES = ("input_ids", "attention_mask", "token_type_ids")


class LabelsScorer:
    """Metrics of the validation rows, with one compiled forward for the whole run."""

    def __init__(
        self,
        forward: Any,
        validation: Mapping[str, LabelsSet],
        task: LabelsTask,
        *,
        batch_size: int,
        pad_id: int,
        mesh: Mesh,
        max_length: int,
    ):
        self.forward, self.validation, self.task = forward, validation, task
        self.batch_size, self.max_length = batch_size, max_length
        self.pad_id, self.mesh = pad_id, mesh

    def __call__(
        self, constants: Constants, trainable: Arrays, key: PRNGKeyArray, title: str
    ) -> Scored:
        """The task's metrics, printed as well, and the prediction of each row."""
        del key  # nothing here draws
        return self.score((constants.frozen, constants.origin, trainable), title)

    def score(self, parts: Any, title: str) -> Scored:
        """The metrics of a model's arrays; of MNLI's two sets with their titles."""
        figures: dict[str, Any] = {}
        predictions: list[dict[str, Any]] = []
        for name, rows in self.validation.items():
            found, predicted = self._score(parts, rows, f"{title} {name}")
            suffix = suffix_of(name, len(self.validation))
            of = {"set": name} if suffix else {}
            figures |= {f"{metric}{suffix}": value for metric, value in found.items()}
            predictions += [of | row for row in predicted]
        shown = ", ".join(f"{metric} {value:.4g}" for metric, value in figures.items())
        hosts.say(f"{title}: {shown}")
        return Scored(figures, predictions)

    def _score(
        self, parts: Any, rows: LabelsSet, title: str
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        logits = over_rows(
            self.forward,
            parts,
            rows.examples,
            batch_size=self.batch_size,
            length=padded_length(rows.examples, self.max_length),
            pad_id=self.pad_id,
            mesh=self.mesh,
            title=title,
        )
        golds = np.asarray([example.label for example in rows.examples])
        predictions = logits[:, 0] if self.task.regression else logits.argmax(axis=-1)
        figures = score_labels(self.task.metrics, predictions, golds)
        return {**figures, "rows": len(golds)}, predicted(logits, golds, self.task)


def predicted(logits: np.ndarray, golds: np.ndarray, task: LabelsTask) -> list[dict[str, Any]]:
    """What is predicted for each row, for the reader.

    Args:
        logits: [rows, C] of the classes, or [rows, 1], the scores of a regression.
        golds: [rows], class ids or scores.
        task: names the classes.
    """
    if task.regression:
        pairs = zip(golds.tolist(), logits[:, 0].tolist(), strict=True)
        rows = [{"gold": gold, "predicted": score} for gold, score in pairs]
        return [{"row": number, **row} for number, row in enumerate(rows, start=1)]
    logits = logits.astype(np.float64)
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares = odds / odds.sum(axis=-1, keepdims=True)
    ids = zip(golds.tolist(), logits.argmax(axis=-1).tolist(), shares.tolist(), strict=True)
    return [
        {
            "row": number,
            "gold": task.labels[gold],
            "predicted": task.labels[choice],
            "right": gold == choice,
            "probabilities": dict(zip(task.labels, row, strict=True)),
        }
        for number, (gold, choice, row) in enumerate(ids, start=1)
    ]


def suffix_of(title: str, sets: int) -> str:
    """What the figures of one of several validation sets end with."""
    return "" if sets == 1 else f"_{title}"


def rates_of(task: LabelsTask, title: str, sets: int) -> list[str]:
    """Names of the metrics of one of several validation sets."""
    return [metric + suffix_of(title, sets) for metric in task.metrics]


def task_of(config: DataConfig) -> LabelsTask:
    """The task that a data section describes."""
    if config.glue is not None:
        return glue_task(config.glue)
    return custom_task(
        config.text_columns, config.label_column, config.labels, regression=config.regression
    )


def logits_forward(bind: Callable[..., Encoder]) -> Any:
    """A jitted function from arrays of the model and of a batch to logits."""
    return jax.jit(lambda parts, *arrays: bind(*parts)(*arrays))


def forward_rows(config: EvalConfig, mesh: Mesh) -> int:
    """Rows of a forward without backward: ``eval.batch_size``, whole over the devices."""
    parts = sharding.row_parts(mesh)
    return -(-config.batch_size // parts) * parts


def train_rows(config: DataConfig, task: LabelsTask) -> Any:
    """The rows to train on: of a file, or of the hub's data set of the task."""
    if config.train is not None:
        assert isinstance(config.train, str)  # checked with the config
        file = _named(config.train, config)
        return load_rows(file, split=config.split, limit=config.train_limit)
    assert task.hub is not None  # checked with the config
    return load_rows(task.hub, split=task.train_split, limit=config.train_limit)


def validation_rows(data: DataConfig, config: EvalConfig, task: LabelsTask) -> dict[str, Any]:
    """Title → rows; none where there are none."""
    limits = [n for n in (config.limit, data.validation_limit) if n is not None]
    limit = min(limits) if limits else None
    if data.validation is not None:
        file = _named(data.validation, data)
        rows = load_rows(file, split=data.validation_split, limit=limit)
        return {"validation": rows}
    if data.train is not None or task.hub is None:
        return {}
    return {
        title: load_rows(task.hub, split=split, limit=limit)
        for title, split in task.validation_splits.items()
    }


def _named(file: str, config: DataConfig) -> str:
    """A path in which ``{glue}`` stands for the task, so that one setting serves a whole study."""
    return file.replace("{glue}", config.glue or "{glue}")


def over_rows(
    forward: Callable[..., Any],
    parts: Any,
    examples: Sequence[LabelsExample],
    *,
    batch_size: int,
    length: int,
    pad_id: int,
    mesh: Mesh,
    title: str,
) -> np.ndarray:
    """``forward(parts, input_ids, attention_mask, token_type_ids)`` [B, C] of all rows: [rows, C].

    ``forward`` is jitted by the caller; it sees few shapes, as rows of like lengths go together.
    ``length`` is that of the longest row, padded. With a progress bar on long sets.
    """
    place, found = rows_sharding(mesh), []
    lengths = [len(example.input_ids) for example in examples]
    batches = batches_by_length(lengths, length, batch_size=batch_size, multiple=LENGTH_MULTIPLE)
    quiet = len(examples) < SHOW_PROGRESS_ABOVE or not hosts.is_first()
    with progress_bar(total=len(examples), desc=title, unit="row", disable=quiet) as bar:
        for places, padded in batches:
            part = [examples[i] for i in places]
            (batch,) = labels_epoch(part, batch_size, padded, pad_id)
            arrays = [hosts.place(batch[name], place) for name in NAMES]
            found.append(hosts.gathered(forward(parts, *arrays))[: len(places)])
            bar.update(len(places))
            hosts.moved()
    order = np.array([i for places, _ in batches for i in places])
    return np.concatenate(found)[np.argsort(order)]
