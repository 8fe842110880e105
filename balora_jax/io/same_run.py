"""What a run must agree with to go on from a checkpoint, and how it may differ."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from balora_jax.config_data import packing_name
from balora_jax.errors import InputError
from balora_jax.numerics.objective import length_schedules

# Keys that may differ when a run goes on: they change where or how often, not what is computed.
FREE_KEYS = (
    "model.name_or_path",  # the base is identified by its fingerprint instead
    "model.revision",
    "model.remat",
    "model.attention",
    "data.validation",
    "data.validation_limit",
    "data.validation_split",
    "regularizers.teacher_cache",
    "regularizers.teacher_cache_folder",
    "training.stop_at",
    "training.extend",
    "training.head",
    "training.head_chunk",
    "training.head_memory_mib",
    "training.max_skipped",
    "training.profile_steps",
    "training.trackers",
    "training.compilation_cache",
    "training.log_every",
    "training.log_gradient_share_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.patience",
    "mesh",
    "eval",
    "study",
)

LENGTH = ("training.max_steps", "training.epochs")


class Identity(NamedTuple):
    """Identity of a run: equal for two that are the same.

    Attributes:
        config: the resolved config as nested dicts.
        base: fingerprint of the pretrained checkpoint.
        start: that of the adapter that it starts from; empty where its adapters start anew.
    """

    config: dict[str, Any]
    base: str
    start: str


def scored_alike(saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two configs, as nested dicts, score the same rows in the same way."""
    return _scoring(saved) == _scoring(now)


def _scoring(config: Mapping[str, Any]) -> list[Any]:
    data = config.get("data") or {}
    rows = [data.get(key) for key in ("validation", "validation_limit", "validation_split")]
    settings = dict(config.get("eval") or {})
    for key in ("batch_size", "every", "score_every"):
        settings.pop(key, None)
    return [*rows, settings]


def check_same_run(saved: Identity, now: Identity, where: str, *, extend: bool = False) -> None:
    """Raises InputError where going on would not be the same run, naming the first difference.

    With ``extend`` it may be longer although its schedules depend on its length.
    """
    if saved.base != now.base:
        raise InputError(
            f"{where}: expected the base model this run began with (fingerprint "
            f"{saved.base[:12]}), got another one ({now.base[:12]}). Set model.name_or_path to the "
            "first base, or use a new --workdir."
        )
    saved_config, config = _in_todays_words(saved.config), _in_todays_words(now.config)
    for key, before, after in differences(saved_config, config):
        if any(key == free or key.startswith(free + ".") for free in FREE_KEYS):
            continue
        advice = "Set it back, or use a new --workdir."
        if key in LENGTH and _is_longer(before, after):
            tied = _tied_to_length(now.config)
            if not tied or extend:
                continue
            advice = (
                f"This changes {', '.join(tied)}, which follow the length of the run: set it back, "
                "or set training.extend=true to go on with them over the new length."
            )
        raise InputError(f"{where}: expected {key} to stay {before!r}, got {after!r}. {advice}")
    if saved.start != now.start:
        raise InputError(
            f"{where}: expected the adapter of adapter.start that this run began with (fingerprint "
            f"{saved.start[:12]}), got another one ({now.start[:12]}). Put the first one back, or "
            "use a new --workdir."
        )


def _in_todays_words(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config; packing was once true or false, and rows with labels are never packed."""
    data = config.get("data")
    if not isinstance(data, Mapping):
        return config
    packing = "batch" if config.get("task") == "labels" else packing_name(data.get("packing"))
    return {**config, "data": {**data, "packing": packing}}


def extension(saved: Identity, now: Identity) -> list[str]:
    """What is to be said of a run that goes on to another length, checked before; else nothing."""
    before, after = saved.config["training"], now.config["training"]
    key = next((key for key in ("max_steps", "epochs") if before[key] != after[key]), None)
    if key is None:
        return []
    tied = _tied_to_length(now.config)
    changed = f"; over the new length now: {', '.join(tied)}" if tied else ""
    return [f"the run is longer: training.{key} {before[key]} -> {after[key]}{changed}"]


def _is_longer(before: Any, after: Any) -> bool:
    return isinstance(before, int | float) and isinstance(after, int | float) and after > before


def _tied_to_length(config: Mapping[str, Any]) -> list[str]:
    """Settings with their values by which a step depends on how many there are in all."""
    training, found = config["training"], []
    if training["schedule"] != "constant":
        found.append(f"training.schedule {training['schedule']}")
    if training["warmup"]:
        found.append(f"training.warmup {training['warmup']}")
    return found + [f"regularizers.{one}" for one in length_schedules(config["regularizers"])]


def differences(
    before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """Dotted keys whose values differ, with both values.

    Example:
        >>> differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}})
        [('a.c', 2, 3)]
    """
    found = []
    for key in sorted(set(before) | set(after)):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append((f"{prefix}{key}", old, new))
    return found
