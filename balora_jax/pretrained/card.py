"""The model card of a folder: what it holds, of which data and settings, its scores, its use."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from balora_jax import hardware
from balora_jax.config import DataConfig, Section
from balora_jax.config_schema import run_schema
from balora_jax.data.glue import GLUE
from balora_jax.data.sources import hub_set
from balora_jax.io.beside import SETTINGS
from balora_jax.io.same_run import FREE_KEYS
from balora_jax.models.starts import STARTS
from balora_jax.numerics.terms import TERMS
from balora_jax.pretrained.base_name import BaseName
from balora_jax.pretrained.card_kinds import ADAPTER, Kind, Loaded
from balora_jax.untyped.shown import one_line

_DATA, _USE = "## Data\n\n", "## Use\n\n"
_MOST = 300  # characters of a value
_PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification"}
_CLASSES = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification"}


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    Attributes:
        base: name of the base.
        task_type: as PEFT has it.
        outputs: of the head of an encoder; None for a decoder.
        sections: ``adapter``, ``regularizers`` and ``training`` of the config, by name.
        data: its section ``data``.
    """

    base: BaseName
    task_type: str
    outputs: int | None
    sections: Mapping[str, Section]
    data: DataConfig


@dataclass(frozen=True)
class Trained(Subject):
    """What a card says of a run.

    Attributes:
        rows: what became of the training rows.
        steps, skipped: optimizer steps, and how many updates of them were skipped.
        before, after: figures of the held-out rows; empty where there are none, or not yet.
    """

    rows: str
    steps: int
    skipped: int
    before: Mapping[str, Any] = field(default_factory=dict)
    after: Mapping[str, Any] = field(default_factory=dict)


def model_card(run: Trained, kind: Kind = ADAPTER) -> str:
    """The card in Markdown, with the front matter that the hub reads.

    Nothing in it depends on the clock, the machine's folders or the folder of the run, so that a
    run which was interrupted writes the same.
    """
    parts = [
        f"{_DATA}{_data(run)}",
        f"## Settings\n\n{_settings(run.sections)}",
        *([f"## Scores\n\n{_scores(run)}"] if run.before or run.after else []),
        f"## The run\n\n{_the_run(run)}",
    ]
    return _card(run, kind, "\n\n".join(parts))


def card_anew(card: str, subject: Subject, kind: Kind) -> str | None:
    """The card of a folder that was exported from an adapter.

    Args:
        card: the adapter's, from which data, settings, scores and run are taken as they stand.
        subject: what both are about.
        kind: the new folder.

    Returns:
        The card; None where the adapter's is not one that :func:`model_card` wrote.
    """
    _, data, rest = card.partition(_DATA)
    middle, use, _ = rest.rpartition(f"\n\n{_USE}")
    return _card(subject, kind, data + middle) if data and use else None


def _card(subject: Subject, kind: Kind, middle: str) -> str:
    again = [] if kind.again is None else [_again(kind.again)]
    title = kind.title.format(code(subject.base.short))
    head = [f"---\n{_front(subject, kind)}\n---", f"# {title}", _what(subject, kind)]
    return "\n\n".join([*head, middle, *again, f"{_USE}{_use(subject, kind)}"]) + "\n"


def code(text: str) -> str:
    """A text as code within a line of Markdown, on one line, whatever is in it.

    >>> print(code("a`b"), code("`"), code(""))
    ``a`b`` `` ` `` `""`
    """
    line = one_line(text, most=_MOST) if text.strip() else json.dumps(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    blank = " " if line[0] in "` " or line[-1] in "` " else ""
    return f"{fence}{blank}{line}{blank}{fence}"


def _block(language: str, text: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _front(run: Subject, kind: Kind) -> str:
    named = [hub_set(source) for source in _sources(run.data)]
    return ModelCardData(
        base_model=run.base.name if run.base.on_hub else None,
        datasets=list(dict.fromkeys(name for name in named if name)) or None,
        library_name=kind.library,
        pipeline_tag=_PIPELINES[run.task_type],
        tags=[*kind.tags, *(["ba-lora"] if _terms(run) else [])] or None,
    ).to_yaml()


def _terms(run: Subject) -> list[str]:
    """The terms that the loss had."""
    return [name for name in TERMS if getattr(run.sections["regularizers"], name) > 0]


def _what(run: Subject, kind: Kind) -> str:
    revision = f" at revision {code(run.base.revision)}" if run.base.revision else ""
    lines = [kind.holds.format(f"{code(run.base.short)}{revision}")]
    if terms := _terms(run):
        lines.append(
            "It was trained with BA-LoRA: beside the loss of the task, terms on the outputs keep "
            f"what the base knew: {', '.join(map(code, terms))}."
        )
    return "\n\n".join(lines)


def _sources(data: DataConfig) -> list[str]:
    """Training sets as the config names them."""
    if data.train is None:
        return [GLUE[data.glue].hub or data.glue] if data.glue else []
    return [data.train] if isinstance(data.train, str) else [one.path for one in data.train]


def _shown_set(source: str) -> str:
    """A data set without the folders above it."""
    return code(source if hub_set(source) else Path(source).name or source)


def _data(run: Trained) -> str:
    lines = [f"- Trained on {_shown_set(source)}" for source in _sources(run.data)]
    lines.append(f"- Of these: {run.rows}")
    if run.data.validation is not None:
        lines.append(f"- Scored on {_shown_set(run.data.validation)}")
    return "\n".join(lines)


def _settings(sections: Mapping[str, Section]) -> str:
    lines = [f"All settings are in [{SETTINGS}]({SETTINGS}). These differ from the defaults:\n"]
    for name, section in sections.items():
        schema: Any = run_schema().model_fields[name].annotation
        values = section.model_dump(mode="json")
        for key, known in schema.model_fields.items():
            same = getattr(section, key) == known.default or f"{name}.{key}" in FREE_KEYS
            if not same:
                lines.append(f"- {code(f'{name}.{key}')}: {code(_value(key, values[key]))}")
    return "\n".join(lines)


def _value(key: str, value: Any) -> str:
    if key == "start" and value not in STARTS:
        value = Path(value).name  # a folder
    return json.dumps(value, ensure_ascii=False)


def _scores(run: Trained) -> str:
    lines = []
    for name in dict.fromkeys((*run.before, *run.after)):
        told = {"before": run.before, "after": run.after}
        found = {when: scores[name] for when, scores in told.items() if name in scores}
        values = list(found.values())
        if len(values) == 2 and values[0] == values[1] and not isinstance(values[0], float):
            lines.append(f"- {code(name)}: {_figure(values[0])}")  # rows, or who judged them
        else:
            said = ", ".join(f"{_figure(value)} {when}" for when, value in found.items())
            lines.append(f"- {code(name)}: {said}")
    return "Of the held-out rows, before the training and after it:\n\n" + "\n".join(lines)


def _figure(value: Any) -> str:
    return (
        f"{value:.4f}"
        if isinstance(value, float)
        else str(value)
        if isinstance(value, int)
        else code(str(value))
    )


def _the_run(run: Trained) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in hardware.versions().items())
    return (
        f"{run.steps} optimizer steps, {run.skipped} updates skipped. Versions: {versions}.\n\n"
        "This makes it again, where the data and the base lie as the settings say:\n\n"
        + _block("bash", f"balora train {SETTINGS} --workdir runs/again")
    )


def _again(command: str) -> str:
    return "And this folder from that run:\n\n" + _block(
        "bash", command.replace("SETTINGS", SETTINGS)
    )


def _use(run: Subject, kind: Kind) -> str:
    options = ""
    if run.base.on_hub and run.base.revision:
        options += f", revision={json.dumps(run.base.revision)}"
    if run.outputs is not None:
        options += f", num_labels={run.outputs}"
    remark = "" if run.base.on_hub else "  # the folder of the base"
    loaded = Loaded(_CLASSES[run.task_type], one_line(run.base.short), options, remark)
    language, text = kind.code
    return _block(language, loaded.filled(text))
