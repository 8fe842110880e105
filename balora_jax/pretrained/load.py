"""From a checkpoint's name to a model that computes: open, plan, load, call."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from balora_jax.array_types import Array, Float, Int, PRNGKeyArray
from balora_jax.data.examples import text_ids
from balora_jax.errors import InputError
from balora_jax.io.peft_reader import PeftAdapter, read_peft
from balora_jax.models.adapters import AdapterShape, adapter_shapes, plan_adapters
from balora_jax.models.generation import Sampling, generate, make_decoder
from balora_jax.models.methods import METHODS
from balora_jax.models.options import AttentionKernel, kernel_on
from balora_jax.models.quantized import Quantization, floating_kernels
from balora_jax.models.starts import STARTS
from balora_jax.models.starts.stacks import start_adapters, start_from_factors
from balora_jax.models.structure import Structure, structure
from balora_jax.models.whole import Whole, begun
from balora_jax.paths import resolve_path
from balora_jax.pretrained.checkpoint import (
    Base,
    EncoderBase,
    head_parts,
    is_encoder,
    open_base,
    open_encoder,
)
from balora_jax.pretrained.peft_start import peft_modules
from balora_jax.pretrained.peft_whole import saved_whole

Ids = Int[Array, "B T"] | Int[np.ndarray, "B T"] | Sequence[Sequence[int]]
"""Rows of one length, as a tokenizer gives them."""


class PretrainedModel:
    """A loaded causal language model: call it for logits, or generate text.

    Attributes:
        base: the checkpoint it came from.
        config: what it is.
        parts: its arrays by path: frozen weights, then adapters and their constants if any.
        bind: from ``*parts`` to the module.
    """

    def __init__(
        self,
        base: Base,
        skeleton: Structure,
        parts: Sequence[dict[str, Array]],
        plain: "PretrainedModel | None" = None,
    ):
        self.config = base.config
        self.parts = tuple(parts)
        self.base = base
        self._plain = plain
        self.bind = skeleton.bind
        self._skeleton = skeleton
        self._logits = jax.jit(lambda parts, ids, mask: skeleton.bind(*parts)(ids, mask))

    @property
    def plain(self) -> "PretrainedModel":
        """The base without the adapter, on the same arrays; this model where there is none."""
        return self._plain or self

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer."""
        return self.base.tokenizer()

    def __call__(self, input_ids: Ids, attention_mask: Ids | None = None) -> Float[Array, "B T V"]:
        """Logits of every position, float32; ``attention_mask`` is 0 on padding.

        Raises:
            InputError: an id without a row in the table, or a row longer than the positions.
        """
        ids = self.base.checked_ids(input_ids)
        mask = jnp.ones_like(ids) if attention_mask is None else jnp.asarray(attention_mask)
        return self._logits(self.parts, ids, mask.astype(jnp.int32))

    def with_adapters(
        self,
        *,
        rank: int,
        key: PRNGKeyArray,
        alpha: float | None = None,
        target_modules: Sequence[str] | str = "all-linear",
        start: str = "pissa",
        method: str = "lora",
    ) -> "PretrainedModel":
        """The same model with new adapters, for training without ``fit``.

        Its ``parts`` are the frozen weights of this one (the same arrays), the constants of the
        adapters, and what trains. At the start it computes what this one does.

        Args:
            rank: R of every adapter.
            key: of the start.
            alpha: numerator of the scale alpha / R; R itself where not given.
            target_modules: as in PEFT: ends of names, one regular expression, or ``all-linear``.
            start: where A and B begin, one of ``balora_jax.adapters.STARTS``.
            method: what trains, one of ``balora_jax.adapters.METHODS`` with adapters.

        Raises:
            InputError: no such layer, start or method, or a rank that does not fit.
        """
        frozen, plain, begin = self.parts[0], self._skeleton, STARTS[start]
        modules = plan_adapters(
            self.base.linears(plain.parameters),
            rank=rank,
            alpha=rank if alpha is None else alpha,
            target_modules=target_modules,
            method=METHODS[method],
        )
        shapes = adapter_shapes(modules, origin=begin.has_origin)
        dtype, quantization = plain.frozen["embed_tokens.embedding"].dtype, plain.quantization
        skeleton = structure(self.config, adapters=shapes, dtype=dtype, quantization=quantization)
        kernels = floating_kernels(frozen, quantization, str(dtype))
        trainable, constants = start_adapters(modules, kernels, start=begin, key=key)
        return PretrainedModel(self.base, skeleton, [frozen, constants, trainable])

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """Continuations of texts; greedy at temperature 0.

        Raises:
            InputError: a prompt that, with what is to be written, does not fit the model.
        """
        tokenizer = self.tokenizer
        sampling = sampling_for(self.base, tokenizer, max_new_tokens, temperature, top_p)
        ids = text_ids(list(prompts), tokenizer)
        self.base.check_prompts(ids, max_new_tokens)
        decoder = make_decoder(self.bind, sampling)
        tokens = generate(
            decoder, self.parts, ids, sampling, batch_size=len(ids), key=jax.random.key(seed)
        )
        return continuations(tokenizer, ids, tokens)


def continuations(
    tokenizer: Any, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]
) -> list[str]:
    """The texts of what was written after prompts, without special tokens.

    Decoded behind its prompt: alone, a tokenizer of sentencepiece takes the first blank of a text
    for the one that it puts before every text.
    """
    before = tokenizer.batch_decode(list(map(list, prompts)), skip_special_tokens=True)
    both = [[*prompt, *answer] for prompt, answer in zip(prompts, tokens, strict=True)]
    whole = tokenizer.batch_decode(both, skip_special_tokens=True)
    alone = tokenizer.batch_decode(list(map(list, tokens)), skip_special_tokens=True)
    return [
        # Where a prompt ends within a character, what follows completes it.
        text[len(start) :] if text.startswith(start) else answer
        for start, text, answer in zip(before, whole, alone, strict=True)
    ]


def sampling_for(
    base: Base,
    tokenizer: Any,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> Sampling:
    """Sampling that stops at the tokenizer's EOS and at what ``generation_config.json`` names."""
    stop = tokenizer.eos_token_id
    stops = {*base.stop_ids(), *(() if stop is None else (int(stop),))}
    pad = base.padding_id(tokenizer)
    return Sampling(max_new_tokens, tuple(sorted(stops)), pad, temperature, top_p)


class PretrainedEncoder:
    """A loaded encoder with its head: call it for the logits of whole rows.

    Attributes:
        base: the checkpoint it came from.
        config: what it is.
        parts: its arrays by path: frozen weights and head, then adapters and their constants.
        bind: from ``*parts`` to the module.
    """

    def __init__(self, base: EncoderBase, skeleton: Structure, parts: Sequence[dict[str, Array]]):
        self.config = base.config
        self.parts = tuple(parts)
        self.base = base
        self.bind = skeleton.bind
        self._logits = jax.jit(lambda parts, *arrays: skeleton.bind(*parts)(*arrays))

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer."""
        return self.base.tokenizer()

    def __call__(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        token_type_ids: Ids | None = None,
    ) -> Float[Array, "B C"]:
        """Logits of every row, float32, or its score; pad on the right.

        Raises:
            InputError: an id without a row in the table, or a row longer than the positions.
        """
        ids = self.base.checked_ids(input_ids)
        mask = jnp.ones_like(ids) if attention_mask is None else jnp.asarray(attention_mask)
        types = jnp.zeros_like(ids) if token_type_ids is None else jnp.asarray(token_type_ids)
        return self._logits(self.parts, ids, mask.astype(jnp.int32), types.astype(jnp.int32))


def load_pretrained(
    path: str, *, adapter: str | None = None, dtype: str = "float32"
) -> PretrainedModel | PretrainedEncoder:
    """Load a checkpoint in Hugging Face layout, optionally with a PEFT adapter on it.

    Args:
        path: a folder, a hub name, or ``balora_jax:quickstart/model``.
        adapter: folder of a PEFT LoRA adapter.
        dtype: of weights and activations, ``float32`` or ``bfloat16``.

    Returns:
        A causal language model, or an encoder with its head, by the checkpoint's family.

    Raises:
        InputError: a checkpoint or adapter that is missing, broken or unsupported.

    Example:
        ``model = load_pretrained("org/name"); logits = model(ids)``
    """
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"dtype: expected 'float32' or 'bfloat16', got {dtype!r}. Choose one.")
    load = load_encoder if is_encoder(path) else load_decoder
    return load(path, adapter=adapter, dtype=dtype)


def load_decoder(
    path: str,
    *,
    adapter: str | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    attention: AttentionKernel = "auto",
    quantization: Quantization = "none",
) -> PretrainedModel:
    """As :func:`load_pretrained`, for a checkpoint that must be a decoder.

    Args:
        path: as there.
        adapter: as there.
        revision: of a hub name.
        dtype: as there.
        attention: kernel of its attention.
        quantization: of its linear layers; adapters stand on the quantised base.
    """
    peft = None if adapter is None else read_peft(resolve_path(adapter))
    kernel = kernel_on(jax.default_backend(), attention, "attention")
    base = open_base(path, revision)
    base.stop_ids()  # what is wrong with them is said before a weight is read
    made = partial(structure, dtype=dtype, kernel=kernel, quantization=quantization)
    plain = made(base.config)
    frozen = base.load_for(plain)
    alone = PretrainedModel(base, plain, [frozen])
    if peft is None:
        return alone
    adapted = _adapted(peft, base, plain, frozen, str(adapter))
    skeleton = made(adapted.config, adapters=adapted.shapes, whole=adapted.whole)
    base = replace(base, config=adapted.config)
    return PretrainedModel(base, skeleton, [frozen, adapted.constants, adapted.trained], alone)


def load_encoder(
    path: str,
    *,
    adapter: str | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    quantization: Quantization = "none",
) -> PretrainedEncoder:
    """As :func:`load_decoder`, for a checkpoint that must be an encoder."""
    peft = None if adapter is None else read_peft(resolve_path(adapter))
    base = open_encoder(path, revision)
    brought = {} if peft is None else head_parts(peft.saved, base.head_rules)
    if "head.out.bias" in brought:
        base = open_encoder(path, revision, num_labels=len(brought["head.out.bias"]))
    missing = {rule.path for rule in base.head_rules} - set(brought) - set(base.stored_head())
    if missing:
        raise InputError(
            f"{path}: expected a head for classes or scores, in the checkpoint or in an adapter, "
            f"got none with {', '.join(sorted(missing))}. Fine-tune it first (task: labels)."
        )
    head = base.load_head(jax.random.key(0)) | {k: jnp.asarray(v) for k, v in brought.items()}
    made = partial(structure, dtype=dtype, quantization=quantization)
    plain = made(base.config)
    frozen = base.load_for(plain)
    if peft is None:
        return PretrainedEncoder(base, plain, [frozen, head])
    adapted = _adapted(peft, base, plain, frozen, str(adapter))
    skeleton = made(adapted.config, adapters=adapted.shapes, whole=adapted.whole)
    base = replace(base, config=adapted.config)
    return PretrainedEncoder(base, skeleton, [frozen, head, adapted.constants, adapted.trained])


class _Adapted(NamedTuple):
    """A base with an adapter of PEFT's on it.

    Attributes:
        config: the base's, perhaps with another vocabulary.
        whole: weights of its own.
        shapes: of the adapters.
        constants, trained: arrays by path.
    """

    config: Any
    whole: Whole
    shapes: dict[str, AdapterShape]
    constants: dict[str, Array]
    trained: dict[str, Array]


def _adapted(
    peft: PeftAdapter,
    base: Base | EncoderBase,
    plain: Structure,
    frozen: dict[str, Array],
    where: str,
) -> _Adapted:
    config, whole = saved_whole(peft, base.config, plain.parameters, where)
    modules = peft_modules(peft, base.linears(plain.parameters), where)
    held = {**frozen, **{path: frozen[source] for path, source in whole.aliases.items()}}
    quantised = sorted(whole.paths - held.keys())
    if quantised:
        raise InputError(
            f"model.quantization: expected none with an adapter that brings {quantised[0]} whole, "
            f"got {plain.quantization}. Set it to none."
        )
    dtype = str(plain.frozen[next(iter(plain.frozen))].dtype)
    kernels = floating_kernels(frozen, plain.quantization, dtype)
    adapters, constants = start_from_factors(modules, kernels, peft.tensors, peft.magnitudes)
    kept = begun(whole, peft.saved, frozen)
    own = {path: jnp.asarray(value, dtype) for path, value in kept.items()}
    shapes = adapter_shapes(modules, origin=False)
    return _Adapted(config, whole, shapes, constants, adapters | own)


def host_copy(arrays: Mapping[str, Array | np.ndarray]) -> dict[str, np.ndarray]:
    """Adapters as host arrays, for export."""
    return {path: np.asarray(value) for path, value in jax.device_get(dict(arrays)).items()}
