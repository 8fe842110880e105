"""The run's schema, one section per factory, and the YAML loader with its error messages."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from balora_jax.errors import InputError

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Dtype = Literal["float32", "bfloat16"]
WarmupSchedule = Literal["constant", "two_phase", "linear_warmup", "quadratic_warmup"]


class Section(BaseModel):
    """A strict, immutable section: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The pretrained checkpoint and how its forward runs.

    Attributes:
        name_or_path: a folder in Hugging Face layout, a hub name, or ``balora_jax:…`` for a
            folder inside this package.
        revision: hub revision.
        dtype: of the frozen weights and activations.
        remat: what the backward recomputes: ``none``, ``dots`` (all but matrix products), ``full``
            (each layer), or ``offload`` (as ``dots``, with the products kept in the host's memory;
            GPU and TPU).
        attention: kernel; ``auto`` takes cuDNN's where the device and dtype allow it.
    """

    name_or_path: str
    revision: str | None = None
    dtype: Dtype = "float32"
    remat: Literal["none", "dots", "full", "offload"] = "full"
    attention: Literal["auto", "xla", "cudnn"] = "auto"


class AdapterConfig(Section):
    """The adapters that train.

    Attributes:
        start: ``pissa``, ``pissa_niter_N`` (randomized SVD, N power iterations), ``lora``, or the
            folder of a PEFT adapter to go on from (its own rank, alpha and targets then hold).
        rank: columns of A.
        alpha: numerator of the scale; the rank where it is not given.
        target_modules: as in PEFT: name suffixes, a regular expression, or ``all-linear``.
        exclude_modules: the same, to leave out.
        rank_pattern, alpha_pattern: other values for layers whose name ends so.
        use_rslora: scale by alpha / √rank.
        dropout: on the adapter's input, for ``lora`` starts.
    """

    start: str = "pissa"
    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] | None = None
    target_modules: tuple[str, ...] | str = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    exclude_modules: tuple[str, ...] | str = ()
    rank_pattern: dict[str, Positive] = {}
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    use_rslora: bool = False
    dropout: Fraction = 0.0

    @model_validator(mode="after")
    def _dropout_needs_lora(self) -> "AdapterConfig":
        if self.dropout > 0.0 and self.start.startswith("pissa"):
            raise ValueError(
                f"adapter.dropout: expected 0 with start {self.start!r}, got {self.dropout}: the "
                "delta from the start would no longer be zero. Set it to 0, or start from 'lora'."
            )
        return self


class RegularizersConfig(Section):
    """The three terms on the outputs; each weight λ stands under its term's name.

    Attributes:
        variant: published form of the terms: ``iclr2026`` or ``arxiv_v1`` (no temperature, entropy
            of the full vocabulary, nuclear ratio).
        consistency, diversity, spectral: λ1, λ2, λ3; 0 leaves the term out of the program.
        temperature: T of the consistency term.
        top_k: entries whose entropy the diversity term raises; 0 for the full vocabulary.
        k: singular values in the spectral term.
        norm: denominator of the spectral ratio.
        consistency_schedule: of λ1 over the run.
        diversity_schedule, spectral_schedule: of λ2 and λ3.
        warmup_fraction: share of the steps that ``linear_warmup`` and ``quadratic_warmup`` take.
        adaptive_min, adaptive_max: range of an ``adaptive`` λ1 (0.1 λ1 and λ1 by default).
        mask_alignment: ``shifted`` as the cross-entropy, or ``official`` as the authors' code.
        center_rows: subtract each logit row's mean before the spectral term.
    """

    variant: Literal["iclr2026", "arxiv_v1"] = "iclr2026"
    consistency: NonNegative = 0.025
    diversity: NonNegative = 0.005
    spectral: NonNegative = 0.005
    temperature: Annotated[float, Field(gt=0)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    k: Positive = 10
    norm: Literal["frobenius", "nuclear"] | None = None
    consistency_schedule: Literal["constant", "cosine", "adaptive"] = "cosine"
    diversity_schedule: WarmupSchedule = "two_phase"
    spectral_schedule: WarmupSchedule = "two_phase"
    warmup_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    adaptive_min: NonNegative | None = None
    adaptive_max: NonNegative | None = None
    mask_alignment: Literal["shifted", "official"] = "shifted"
    center_rows: bool = False


class DataConfig(Section):
    """Rows, and how each becomes tokens.

    Attributes:
        train, validation: a JSON-lines, CSV or parquet file, or a hub data-set name.
        split, validation_split: of hub data sets.
        train_limit, validation_limit: use the first rows only.
        template: ``alpaca``, ``plain``, ``chat`` (the tokenizer's), or a text with ``{column}``.
        prompt_column, response_column: columns of a row.
        messages_column: column with chat messages instead (``template: chat``).
        max_length: tokens of a row or of a packed row.
        overlong: what happens to longer rows: ``truncate`` or ``drop``; both are counted.
        packing: put several rows in one, each attending to itself only.
    """

    train: str
    validation: str | None = None
    split: str = "train"
    validation_split: str = "validation"
    train_limit: Positive | None = None
    validation_limit: Positive | None = None
    template: str = "alpaca"
    prompt_column: str = "instruction"
    response_column: str = "output"
    messages_column: str | None = None
    max_length: Positive = 512
    overlong: Literal["truncate", "drop"] = "truncate"
    packing: bool = False


class TrainingConfig(Section):
    """The optimization.

    Attributes:
        max_steps: optimizer steps in all; give this or ``epochs``.
        epochs: passes over the data, instead of ``max_steps``.
        stop_at: end this session at this step, with a checkpoint; schedules still span max_steps.
        batch_size: rows of one optimizer step over all devices.
        accumulation: micro-batches that a step is split into.
        optimizer: by name.
        learning_rate: peak.
        schedule: of the learning rate after the warm-up.
        warmup: fraction of the steps.
        weight_decay: on matrices only.
        beta1, beta2, epsilon: of Adam-like optimizers.
        clip_norm: largest global gradient norm; None for no clipping.
        lora_plus_ratio: learning rate of B over that of A (LoRA+).
        seed: of starts, order of the data and dropout.
        head: ``fused``: logits exist for one chunk of tokens at a time; ``plain``: all of them at
            once, with automatic derivatives (a reference, large).
        head_chunk: tokens of a chunk on a device; by ``head_memory_mib`` where it is not given.
        head_memory_mib: memory for the logits of a chunk on a device, in MiB; 64 on a CPU and 768
            elsewhere where it is not given.
        log_every: steps between rows of ``metrics.jsonl``.
        log_gradient_share_every: steps between measurements of each term's gradient norm; 0 never.
        checkpoint_every: steps between checkpoints; 0 only at the end.
        keep_checkpoints: how many of the newest are kept.
    """

    max_steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    stop_at: Positive | None = None
    batch_size: Positive = 32
    accumulation: Positive = 1
    optimizer: Literal["adamw", "lion", "sgd"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Fraction = 0.03
    weight_decay: NonNegative = 0.0
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    lora_plus_ratio: Annotated[float, Field(gt=0)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    head: Literal["fused", "plain"] = "fused"
    head_chunk: Positive | None = None
    head_memory_mib: Positive | None = None
    log_every: Positive = 1
    log_gradient_share_every: Annotated[int, Field(ge=0)] = 0
    checkpoint_every: Annotated[int, Field(ge=0)] = 100
    keep_checkpoints: Positive = 2

    @model_validator(mode="after")
    def _consistent(self) -> "TrainingConfig":
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError(
                "training: expected either max_steps or epochs, got "
                f"{'neither' if self.max_steps is None else 'both'}. Give one of them."
            )
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"training.accumulation: expected a divisor of batch_size {self.batch_size}, got "
                f"{self.accumulation}. Choose one that divides it."
            )
        return self


class MeshConfig(Section):
    """How many devices lie along each axis; -1 once for all that are left.

    Attributes:
        data: copies of the model; rows of the batch are split over data and fsdp.
        fsdp: parts of every weight matrix, gathered for use.
        tensor: parts of heads, inner width and vocabulary.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    @model_validator(mode="after")
    def _sizes(self) -> "MeshConfig":
        sizes = (self.data, self.fsdp, self.tensor)
        if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(
                f"mesh: expected positive sizes with at most one -1, got data={self.data}, "
                f"fsdp={self.fsdp}, tensor={self.tensor}. Correct them."
            )
        return self


class EvalConfig(Section):
    """The score before and after training on ``data.validation``.

    Attributes:
        task: how answers are compared: a number after the marker, or none to skip the score.
        marker: text before the answer.
        limit: use the first rows only.
        batch_size: prompts decoded together.
        max_new_tokens: longest answer.
        temperature: 0 for greedy decoding.
        top_p: share of the probability that sampling draws from.
        prompt_column: column of the question; ``data.prompt_column`` where not given.
        gold_column: column of the right answer; ``data.response_column`` where not given.
    """

    task: Literal["exact_match", "none"] = "exact_match"
    marker: str = "The answer is:"
    limit: Positive | None = None
    batch_size: Positive = 32
    max_new_tokens: Positive = 256
    temperature: NonNegative = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    prompt_column: str | None = None
    gold_column: str | None = None


class RunConfig(Section):
    """One run: one file in ``configs/``."""

    model: ModelConfig
    adapter: AdapterConfig = AdapterConfig()
    regularizers: RegularizersConfig = RegularizersConfig()
    data: DataConfig
    training: TrainingConfig
    mesh: MeshConfig = MeshConfig()
    eval: EvalConfig = EvalConfig()


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML config and apply ``key.path=value`` overrides.

    Raises:
        InputError: a missing or malformed file, an unknown key (with a suggestion), a value of
            the wrong type or out of range; the message names the key.

    Example:
        >>> load_config("configs/absent.yaml")
        Traceback (most recent call last):
        balora_jax.errors.InputError: configs/absent.yaml: expected a config file, found none. ...
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: expected a config file, found none. Check the path.")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = " ".join(str(error).split())
        raise InputError(f"{path}: expected YAML, got: {line}. Correct the file.") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected sections such as 'model:', got {tree!r}. Fill it in.")
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree, str(path))


def parse_config(tree: Mapping[str, Any], where: str) -> RunConfig:
    """Validate a nested mapping; ``where`` opens every message."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{where}: {_describe(error)}") from error


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML that ``load_config`` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set: expected key.path=value, got {override!r}. Write it so.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"--set {key}: expected a YAML value, got {text!r}. Quote it.") from error
    *parents, leaf = key.strip().split(".")
    node = tree
    for parent in parents:
        below = node.setdefault(parent, {})
        if not isinstance(below, dict):
            raise InputError(f"--set {key}: {parent!r} is not a section. Check the key.")
        node = below
    node[leaf] = value


def _describe(error: ValidationError) -> str:
    """The first problem as one sentence; pydantic's own wording is not a user's."""
    first = error.errors()[0]
    location = ".".join(str(part) for part in first["loc"] if not _is_type_tag(part))
    kind, got = first["type"], first.get("input")
    if kind == "extra_forbidden":
        return _unknown_key([str(part) for part in first["loc"]])
    if kind == "missing":
        return f"{location}: expected a value, got none. Add the key."
    if kind == "value_error":
        return str(first.get("ctx", {}).get("error", first["msg"]))
    expected = first["msg"].removeprefix("Input should be ").rstrip(".")
    return f"{location}: expected {expected}, got {got!r}. Correct the value."


def _is_type_tag(part: Any) -> bool:
    """Pydantic adds the branch of a union ('str', 'tuple[str, ...]') to a location."""
    return isinstance(part, str) and (part in ("str", "int", "float") or "[" in part)


def _unknown_key(location: list[str]) -> str:
    section: type[BaseModel] = RunConfig
    for part in location[:-1]:
        section = section.model_fields[part].annotation  # type: ignore[assignment]
    known = list(section.model_fields)
    near = difflib.get_close_matches(location[-1], known, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"It knows {', '.join(known)}."
    where = ".".join(location[:-1]) or "the top level"
    return f"{'.'.join(location)}: unknown key in {where}. {hint}"
