"""From a checkpoint's name to a model that computes: open, plan, load, call."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from balora_jax.array_types import Array, Float, Int
from balora_jax.errors import InputError
from balora_jax.evals.generation import Sampling, generate, make_decoder
from balora_jax.io.hf_files import find_checkpoint, fingerprint, read_json, read_json_config
from balora_jax.io.hf_weights import load_weights
from balora_jax.io.peft_adapter import PeftAdapter, read_peft
from balora_jax.models import registry
from balora_jax.models.adapters import AdaptedModule, LinearShape, adapter_shapes
from balora_jax.models.decoder import DecoderConfig, Structure, structure
from balora_jax.models.starts import start_from_factors
from balora_jax.paths import resolve_path
from balora_jax.training.sharding import with_shardings


@dataclass(frozen=True)
class Base:
    """A pretrained checkpoint that was opened but not loaded.

    Attributes:
        folder: where it lies.
        config: what it is.
    """

    folder: Path
    config: DecoderConfig

    @cached_property
    def fingerprint(self) -> str:
        """Identity of config and weights, kept with checkpoints."""
        return fingerprint(self.folder)

    def load(
        self, shapes: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh | None = None
    ) -> dict[str, Array]:
        """The frozen weights; each device reads its own slices."""
        targets = dict(shapes) if mesh is None else with_shardings(shapes, mesh)
        rules = registry.weight_rules(self.config)
        ignore = registry.ignored_weights(self.config)
        return load_weights(self.folder, targets, rules, ignore=ignore)

    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a text besides the tokenizer's EOS: Llama 3 names several."""
        file = self.folder / "generation_config.json"
        named = read_json(file).get("eos_token_id") if file.is_file() else None
        return tuple(named) if isinstance(named, list) else () if named is None else (int(named),)

    def tokenizer(self) -> Any:
        """The checkpoint's own tokenizer (``transformers``), never with remote code."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            line = " ".join(str(error).split())[:200]
            raise InputError(
                f"{self.folder}: expected a tokenizer (tokenizer.json), got: {line} Save the "
                "tokenizer beside the weights."
            ) from error


def open_base(name_or_path: str, revision: str | None = None) -> Base:
    """Find a checkpoint and read its config; nothing is loaded yet."""
    folder = find_checkpoint(resolve_path(name_or_path), revision)
    raw = read_json_config(folder)
    return Base(folder, registry.decoder_config(raw, str(folder / "config.json")))


def peft_modules(
    peft: PeftAdapter, linears: Sequence[LinearShape], where: str
) -> tuple[AdaptedModule, ...]:
    """The adapted layers of a PEFT adapter on this base.

    Raises:
        InputError: a layer that the base does not have, or one of another size.
    """
    known = {name: (shape, i) for shape in linears for i, name in enumerate(shape.names)}
    modules = []
    for name, (a, b) in peft.tensors.items():
        if name not in known:
            raise InputError(
                f"{where}: expected adapters for this base model, got one for {name!r}, which it "
                "does not have. Name the base the adapter was trained on."
            )
        shape, layer = known[name]
        if (a.shape[0], b.shape[1]) != (shape.in_features, shape.out_features):
            raise InputError(
                f"{where}: expected {shape.in_features} -> {shape.out_features} features at "
                f"{name}, got {a.shape[0]} -> {b.shape[1]}. Name the base it was trained on."
            )
        modules.append(
            AdaptedModule(
                name, shape.path, layer, peft.ranks[name], peft.alphas[name], peft.scales[name],
                shape.in_features, shape.out_features,
            )
        )  # fmt: skip
    return tuple(modules)


class PretrainedModel:
    """A loaded causal language model: call it for logits, or generate text.

    Attributes:
        base: the checkpoint it came from.
        config: what it is.
        parts: its arrays by path: frozen weights, then adapters and their constants if any.
        bind: from ``*parts`` to the module.
    """

    def __init__(self, base: Base, skeleton: Structure, parts: Sequence[dict[str, Array]]):
        self.config = base.config
        self.parts = tuple(parts)
        self.base = base
        self.bind = skeleton.bind
        self._logits = jax.jit(lambda parts, ids, mask: skeleton.bind(*parts)(ids, mask))

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer."""
        return self.base.tokenizer()

    def __call__(
        self, input_ids: Int[Array, "B T"], attention_mask: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T V"]:
        """Logits of every position, float32; ``attention_mask`` is 0 on padding."""
        ids = jnp.asarray(input_ids, jnp.int32)
        mask = jnp.ones_like(ids) if attention_mask is None else jnp.asarray(attention_mask)
        return self._logits(self.parts, ids, mask.astype(jnp.int32))

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """Continuations of texts; greedy at temperature 0."""
        tokenizer = self.tokenizer
        sampling = sampling_for(
            tokenizer, max_new_tokens, temperature, top_p, stop_ids=self.base.stop_ids()
        )
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        decoder = make_decoder(self.bind, sampling)
        tokens = generate(
            decoder, self.parts, ids, sampling, batch_size=len(ids), key=jax.random.key(seed)
        )
        return tokenizer.batch_decode(tokens, skip_special_tokens=True)


def sampling_for(
    tokenizer: Any,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    *,
    stop_ids: Sequence[int] = (),
) -> Sampling:
    """Sampling that stops at the tokenizer's EOS or ``stop_ids``, and pads with the tokenizer's
    padding, or its EOS where there is none.
    """
    stop = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop
    stops = tuple(sorted({*stop_ids, *(() if stop is None else (int(stop),))}))
    return Sampling(max_new_tokens, stops, int(pad or 0), temperature, top_p)


def load_pretrained(
    path: str, *, adapter: str | None = None, dtype: str = "float32"
) -> PretrainedModel:
    """Load a checkpoint in Hugging Face layout, optionally with a PEFT adapter on it.

    Args:
        path: a folder, a hub name, or ``balora_jax:quickstart/model``.
        adapter: folder of a PEFT LoRA adapter.
        dtype: of weights and activations, ``float32`` or ``bfloat16``.

    Raises:
        InputError: a checkpoint or adapter that is missing, broken or unsupported.

    Example:
        ``model = load_pretrained("org/name"); logits = model(ids)``
    """
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"dtype: expected 'float32' or 'bfloat16', got {dtype!r}. Choose one.")
    base = open_base(path)
    plain = structure(base.config, dtype=dtype)
    if adapter is None:
        return PretrainedModel(base, plain, [base.load(plain.frozen)])
    peft = read_peft(adapter)
    modules = peft_modules(peft, registry.linear_shapes(base.config, plain.frozen), adapter)
    skeleton = structure(base.config, adapters=adapter_shapes(modules, origin=False), dtype=dtype)
    frozen = base.load(plain.frozen)
    adapters, constants = start_from_factors(modules, frozen, peft.tensors)
    return PretrainedModel(base, skeleton, [frozen, constants, adapters])


def host_copy(arrays: Mapping[str, Array]) -> dict[str, np.ndarray]:
    """Adapters as host arrays, for export."""
    return {path: np.asarray(value) for path, value in jax.device_get(dict(arrays)).items()}
