"""The run's schema: one section per factory."""

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from balora_jax.config_data import DataConfig
from balora_jax.config_types import Fraction, NonNegative, Positive, Section
from balora_jax.models.methods import METHODS
from balora_jax.models.starts import STARTS
from balora_jax.numerics.objective import MaskAlignment
from balora_jax.numerics.schedules import WARMUP_FRACTION
from balora_jax.numerics.terms.term import Variant

Dtype = Literal["float32", "bfloat16"]
Grader = Literal["auto", "math_verify", "plain", "authors", "lm_eval_strict", "lm_eval_flexible"]


OF_THE_TEACHER = {
    *("teacher", "teacher_head", "teacher_cache", "teacher_cache_folder", "teacher_fraction"),
}
"""Keys of ``regularizers`` that say how the teacher is made, not what is computed with it."""

PAPER_NAMES = {"nlg": "text", "nlu": "labels"}
"""The paper's names of the two tasks, which configs may use too."""


def task_name(value: Any) -> Any:
    """The name of a task, from the paper's or from ours."""
    return PAPER_NAMES.get(value, value) if isinstance(value, str) else value


Task = Annotated[Literal["text", "labels"], BeforeValidator(task_name)]


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
        attention: ``xla`` forms the scores of a whole row; ``blocks``, in rows of more than 256
            tokens, a block at a time, so that memory grows with the row and not with its square;
            ``cudnn`` is a GPU's own. ``auto``: cuDNN's on a GPU where the dtype allows it, blocks
            on a CPU, xla on a TPU.
        quantization: of the frozen linear layers: ``int8`` (absmax by output) or ``nf4`` (4 bits,
            by block); needs the extra ``quant``.
    """

    name_or_path: str
    revision: str | None = None
    dtype: Dtype = "float32"
    remat: Literal["none", "dots", "full", "offload"] = "full"
    attention: Literal["auto", "xla", "blocks", "cudnn"] = "auto"
    quantization: Literal["none", "int8", "nf4"] = "none"


class AdapterConfig(Section):
    """The adapters that train.

    Attributes:
        start: ``pissa``, ``pissa_niter_N`` (randomized SVD, N power iterations), ``lora``,
            ``olora``, ``milora``, ``orthogonal``, or the folder of a PEFT adapter to go on from
            (its own method, rank, alpha and targets then hold).
        method: ``lora``; ``dora``, with a trained magnitude for every output; ``lora_fa``, where A
            stays as it started; or ``full``, no adapters: every weight of the model trains.
        rank: columns of A.
        alpha: numerator of the scale; the rank where it is not given.
        target_modules: as in PEFT: name suffixes, a regular expression, or ``all-linear``.
        exclude_modules: the same, to leave out.
        rank_pattern, alpha_pattern: other values for layers whose name ends so.
        use_rslora: scale by alpha / √rank.
        dropout: on the adapter's input, for ``lora`` starts.
        modules_to_save: embeddings, heads and norms that train whole, by the ends of their names
            as in PEFT (``embed_tokens``, ``lm_head``, ``norm``); a tied head becomes its own.
        trainable_token_indices: ids whose rows of the embeddings (and a tied head) train, as there.
    """

    start: str = "pissa"
    method: str = "lora"
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
    modules_to_save: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    trainable_token_indices: tuple[Annotated[int, Field(ge=0)], ...] = ()

    @model_validator(mode="after")
    def _fits_the_start(self) -> "AdapterConfig":
        named = self.start in STARTS
        if self.dropout > 0.0 and named and not STARTS[self.start].allows_dropout:
            raise ValueError(
                f"adapter.dropout: expected 0 with start {self.start!r}, got {self.dropout}: the "
                "delta from the start would no longer be zero. Set it to 0, or start from 'lora'."
            )
        method = METHODS[self.method]
        if method.trains_base and not named:
            raise ValueError(
                f"adapter.start: expected no folder with method {self.method!r}, got "
                f"{self.start!r}: there are no adapters. Leave it out."
            )
        if method.trains_base and (self.modules_to_save or self.trainable_token_indices):
            raise ValueError(
                "adapter.modules_to_save, trainable_token_indices: expected none, got some with "
                f"method {self.method!r}: every weight trains. Leave them out."
            )
        if self.dropout > 0.0 and not method.allows_dropout:
            raise ValueError(
                f"adapter.dropout: expected 0 with method {self.method!r}, got {self.dropout}. "
                "Set it to 0, or use method 'lora' or 'lora_fa'."
            )
        return self


class RegularizersConfig(Section):
    """The terms on the outputs; each weight λ stands under its term's name.

    The keys of the terms themselves come from their registry: see
    :func:`balora_jax.config_schema.run_schema`.

    Attributes:
        variant: published form of the terms: ``iclr2026`` or ``arxiv_v1`` (no temperature, entropy
            of the full vocabulary, nuclear ratio).
        warmup_fraction: share of the steps that ``linear_warmup`` and ``quadratic_warmup`` take.
        mask_alignment: ``shifted`` as the cross-entropy, or ``official`` as the authors' code.
        teacher: what a term compares the model with: ``base``, the pretrained weights, or
            ``start``, the model as it starts to train, with the adapter of ``adapter.start`` and
            what that folder trained whole (head, embeddings, norms, rows of tokens); where the
            adapters start anew the two are one.
        teacher_head: of ``task: labels``, the frozen head behind the frozen encoder:
            ``student_init``, the student's own first head, or ``probe``, a head fitted on the
            teacher's features before the run; the student begins with the same head either way.
        teacher_cache: compute the teacher once, before the first step, instead of in each step,
            and keep it beside the run: its logits of every row (labels, where not given) or its
            last hidden states of every counted position (text, if asked for).
        teacher_cache_folder: of ``task: text``, another folder for them, which several runs share.
        teacher_fraction: of ``task: text``, share of the rows of each micro-batch, on each device
            rounded up, on which the terms that read the teacher are computed; drawn anew each time,
            and on average what all rows give.
    """

    variant: Variant = "iclr2026"
    warmup_fraction: Annotated[float, Field(ge=0, le=1)] = WARMUP_FRACTION
    mask_alignment: MaskAlignment = "shifted"
    teacher: Literal["base", "start"] = "base"
    teacher_head: Literal["student_init", "probe"] = "student_init"
    teacher_cache: bool | None = None
    teacher_cache_folder: str | None = None
    teacher_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0

    def of_the_terms(self) -> dict[str, Any]:
        """What :func:`balora_jax.numerics.objective.objective_of` reads."""
        return self.model_dump(exclude=OF_THE_TEACHER)


class TrainingConfig(Section):
    """The optimization.

    Attributes:
        max_steps: optimizer steps in all; give this or ``epochs``.
        epochs: passes over the data, instead of ``max_steps``.
        extend: a run that goes on may be made longer (``max_steps`` or ``epochs``) though its
            schedules depend on its length: they then span the new one. Without it only a run of
            constant schedules without a warm-up may.
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
        spike_sigmas: skip the update of a step whose loss or gradient norm lies this many
            standard deviations above the mean of the steps before it; None for no such check. A
            step whose loss or gradient is not finite is always skipped.
        max_skipped: stop the run when more updates than this were skipped one after another.
        head: ``fused``: logits exist for one chunk of tokens at a time; ``plain``: all of them at
            once, with automatic derivatives (a reference, large).
        head_chunk: tokens of a chunk on a device; by ``head_memory_mib`` where it is not given.
        head_memory_mib: memory for the logits of a chunk on a device, in MiB; 64 on a CPU and 768
            elsewhere where it is not given.
        log_every: steps between rows of ``metrics.jsonl``.
        log_gradient_share_every: steps between measurements of each term's gradient norm; 0 never.
        checkpoint_every: steps between checkpoints; 0 only at the end.
        keep_checkpoints: how many of the newest are kept.
        keep_best: also export the adapter of the step at which a figure of the held-out rows was
            best, to ``best/``: ``validation_loss``, another ``validation_`` figure (lower is
            better), or ``score_exact_match`` and the like (higher is); None for the last alone.
        patience: stop after this many measurements in a row of ``keep_best``'s figure, or of
            ``validation_loss``, that are no better than the best; None to take all steps.
        profile_steps: first and last step of a trace in ``profile/``, which TensorBoard and
            Perfetto open; None for none.
        trackers: names of what gets every row of the log besides ``metrics.jsonl``; your own come
            from a file in ``extensions``.
        compilation_cache: where compiled programs are kept for the next run, evaluation or
            generation: ``auto``, the folder that ``BALORA_COMPILATION_CACHE`` names or else
            ``~/.cache/balora_jax/compiled``; a folder, which several hosts must share; ``none``.
            ``JAX_COMPILATION_CACHE_DIR``, where it is set, comes before all of them.
    """

    max_steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    extend: bool = False
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
    spike_sigmas: Annotated[float, Field(gt=0)] | None = None
    max_skipped: Annotated[int, Field(ge=0)] = 5
    head: Literal["fused", "plain"] = "fused"
    head_chunk: Positive | None = None
    head_memory_mib: Positive | None = None
    log_every: Positive = 1
    log_gradient_share_every: Annotated[int, Field(ge=0)] = 0
    checkpoint_every: Annotated[int, Field(ge=0)] = 100
    keep_checkpoints: Positive = 2
    keep_best: str | None = None
    patience: Positive | None = None
    profile_steps: tuple[Positive, Positive] | None = None
    trackers: tuple[str, ...] = ()
    compilation_cache: Annotated[str, Field(min_length=1)] = "auto"

    @model_validator(mode="after")
    def _consistent(self) -> "TrainingConfig":
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError(
                "training: expected either max_steps or epochs, got "
                f"{'neither' if self.max_steps is None else 'both'}. Give one of them."
            )
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(
                f"training.trackers: expected each name once, got {list(self.trackers)}. Leave out "
                "the second."
            )
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"training.accumulation: expected a divisor of batch_size {self.batch_size}, got "
                f"{self.accumulation}. Choose one that divides it."
            )
        if self.profile_steps and self.profile_steps[0] > self.profile_steps[1]:
            raise ValueError(
                "training.profile_steps: expected first <= last, got "
                f"{list(self.profile_steps)}. Swap them."
            )
        return self


class MeshConfig(Section):
    """Number of devices along each axis; -1 once for all that are left.

    Attributes:
        data: copies of the model; rows of the batch are split over data, fsdp and expert.
        fsdp: parts of every weight matrix, gathered for use.
        expert: parts of the experts of every layer, in models that have experts.
        tensor: parts of heads, inner width and vocabulary.
        sequence: parts of every row's tokens; keys and values of a row are gathered.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    sequence: int = 1

    @model_validator(mode="after")
    def _sizes(self) -> "MeshConfig":
        sizes = (self.data, self.fsdp, self.expert, self.tensor, self.sequence)
        if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(
                f"mesh: expected positive sizes with at most one -1, got data={self.data}, "
                f"fsdp={self.fsdp}, expert={self.expert}, tensor={self.tensor}, "
                f"sequence={self.sequence}. Correct them."
            )
        return self


class EvalConfig(Section):
    """The score and the loss of ``data.validation``, before, after and while a run trains.

    Attributes:
        every: steps between measurements of the loss and the terms on the validation rows, taken as
            training examples; before the first step and at the end too; 0 never.
        score_every: steps between scores while the run trains; 0 only before and after.
        task: the benchmark: ``exact_match``, ``gsm8k``, ``gsm_hard``, ``svamp``, ``asdiv``,
            ``math`` (text) or ``labels``; ``none`` for no score; where not given, ``exact_match``
            for text and ``labels`` for labels.
        grader: who judges a text: ``auto`` is ours, with math-verify where it is installed;
            ``math_verify`` insists on it and ``plain`` does without; ``authors``,
            ``lm_eval_strict`` and ``lm_eval_flexible`` are those of others, for comparison.
        marker: text before the answer; not empty.
        limit: score the first rows only; ``data.validation_limit`` holds for the loss as well.
        batch_size: prompts decoded together.
        max_new_tokens: longest answer.
        temperature: 0 for greedy decoding.
        top_p: share of the probability that sampling draws from.
        prompt_column: column of the question; the benchmark's or ``data.prompt_column`` where not
            given.
        gold_column: column of the right answer; the benchmark's or ``data.response_column`` where
            not given.
        samples: of so many validation rows, the first ones, the answers are kept at every score of
            a run (``samples.jsonl``) and shown, whether they are scored or not.
        prompts: questions of your own whose answers are kept and shown as those of ``samples``.
    """

    every: Annotated[int, Field(ge=0)] = 0
    score_every: Annotated[int, Field(ge=0)] = 0
    task: str | None = None
    grader: Grader = "auto"
    marker: Annotated[str, Field(min_length=1)] = "The answer is:"
    limit: Positive | None = None
    batch_size: Positive = 32
    max_new_tokens: Positive = 256
    temperature: NonNegative = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    prompt_column: str | None = None
    gold_column: str | None = None
    samples: Annotated[int, Field(ge=0)] = 0
    prompts: tuple[str, ...] = ()


class StudyConfig(Section):
    """Many runs of one config: every dataset by every variant by every seed.

    Attributes:
        datasets: name → settings (``key.path: value``) of a row of the table.
        variants: name → settings of a column, applied after those of the row; none for no study.
        seeds: of ``training.seed``.
    """

    datasets: dict[str, dict[str, Any]] = {"all": {}}
    variants: dict[str, dict[str, Any]] = {}
    seeds: tuple[int, ...] = (42, 1024, 2024)


class RunConfig(Section):
    """One run: one file in ``configs/``.

    Attributes:
        task: ``text`` trains a decoder on text, ``labels`` an encoder with a head on labels; the
            paper's ``nlg`` and ``nlu`` are read as these.
        extensions: Python files of your own, relative to this one, that register terms, starts,
            families, benchmarks or trackers.
    """

    extensions: tuple[str, ...] = ()
    task: Task = "text"
    model: ModelConfig
    adapter: AdapterConfig = AdapterConfig()
    regularizers: RegularizersConfig = RegularizersConfig()
    data: DataConfig
    training: TrainingConfig
    mesh: MeshConfig = MeshConfig()
    eval: EvalConfig = EvalConfig()
    study: StudyConfig = StudyConfig()
