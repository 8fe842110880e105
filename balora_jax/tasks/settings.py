"""Checks of the settings: none that the task does not read, none missing that it needs."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from balora_jax.config import DataConfig, EvalConfig, RunConfig, Section
from balora_jax.errors import InputError
from balora_jax.evals.benchmark import Benchmark, TextBenchmark
from balora_jax.evals.tasks import BENCHMARKS
from balora_jax.tasks.labels import settings as labels
from balora_jax.tasks.text import settings as text


class TaskSettings(NamedTuple):
    """Rules of a task about its settings.

    Attributes:
        benchmark: that it is scored on where ``eval.task`` is not given.
        unread: keys that must be left at their default.
        no_request: values of them that ask for nothing either.
        ignores: how a message says that it does not read a key.
        check: raises InputError where what it needs is missing.
    """

    benchmark: str
    unread: tuple[str, ...]
    no_request: Mapping[str, Any]
    ignores: str
    check: Callable[[DataConfig], None]


SETTINGS: Mapping[str, TaskSettings] = {
    "text": TaskSettings("exact_match", text.UNREAD, {}, "text does not read it", text.check),
    "labels": TaskSettings(
        "labels", labels.UNREAD, labels.NO_REQUEST, "labels do not read it", labels.check
    ),
}


def check_settings(config: RunConfig) -> None:
    """Refuse what the task of a config does not read, and what does not fit it.

    A key at its default is no request, so that a dumped config loads again.

    Raises:
        InputError: the first such key, by name.
    """
    task = SETTINGS[config.task]
    for key in task.unread:
        section, name = key.split(".")
        got, default = setting(getattr(config, section), name)
        if got not in (default, task.no_request.get(key, default)):
            raise InputError(
                f"{key}: expected {shown(default)} with task {config.task}, got {shown(got)}: "
                f"{task.ignores}. Leave it out."
            )
    benchmark = benchmark_of(config.task, config.eval.task)
    if isinstance(benchmark, TextBenchmark):
        _check_grader(benchmark, config.eval)
    task.check(config.data)


def _check_grader(benchmark: TextBenchmark, config: EvalConfig) -> None:
    benchmark.check_grader(config.grader)
    marker, default = setting(config, "marker")
    without = [grader.name for grader in benchmark.graders if not grader.reads_marker]
    if marker != default and config.grader in without:
        raise InputError(
            f"eval.marker: expected {default!r} with eval.grader {config.grader}, got {marker!r}: "
            "it reads no marker. Leave it out."
        )


def setting(section: Section, name: str) -> tuple[Any, Any]:
    """The value of a key and its default."""
    default = type(section).model_fields[name].get_default(call_default_factory=True)
    return getattr(section, name), default


def shown(value: Any) -> str:
    """A value as YAML writes it.

    >>> shown(True), shown(None), shown("truncate"), shown(("a", "b"))
    ('true', 'null', 'truncate', '[a, b]')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(shown, value))}]"
    return "null" if value is None else str(value)


def benchmark_of(task: str, asked: str | None) -> Benchmark:
    """What a run is scored on: ``eval.task`` if it is given, else what its task is scored on.

    Raises:
        InputError: no such benchmark, or one for another task.
    """
    benchmark = BENCHMARKS[asked or SETTINGS[task].benchmark]
    if benchmark.task not in (None, task):
        known = [b.name for b in BENCHMARKS.values() if b.task in (None, task)]
        raise InputError(
            f"eval.task: expected one of {', '.join(known)} with task {task}, got "
            f"{benchmark.name}, which scores {benchmark.task}. Choose one of them, or leave it out."
        )
    return benchmark
