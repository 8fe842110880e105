"""What is a pretrained checkpoint, before its weights are loaded?"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from balora_jax.array_types import Array, PRNGKeyArray
from balora_jax.errors import InputError
from balora_jax.io.hf_files import (
    find_checkpoint,
    fingerprint,
    open_tensors,
    read_json,
    read_json_config,
)
from balora_jax.io.hf_weights import load_weights
from balora_jax.models import encoder_registry, registry, weight_names
from balora_jax.models.adapters import LinearShape
from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.encoder import EncoderConfig, init_head
from balora_jax.models.quantized import quantize_kernel
from balora_jax.models.structure import Structure
from balora_jax.models.weight_names import WeightRule
from balora_jax.parallel.sharding import Layout
from balora_jax.paths import resolve_path

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt"),
    *("spiece.model", "spm.model", "sentencepiece.bpe.model"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A pretrained checkpoint that was opened but not loaded.

    Attributes:
        folder: where it lies.
        rules: the weight-name table of what stays frozen.
        ignored: patterns of names that may be left over.
    """

    folder: Path
    rules: tuple[WeightRule, ...]
    ignored: tuple[str, ...]

    @cached_property
    def fingerprint(self) -> str:
        """Identity of config and weights, kept with checkpoints."""
        return fingerprint(self.folder)

    def load(
        self, shapes: Mapping[str, jax.ShapeDtypeStruct], layout: Layout | None = None
    ) -> dict[str, Array]:
        """The frozen weights; each device reads its own slices, or the first one all of them."""
        targets = dict(shapes) if layout is None else layout.attached(shapes)
        # What is not asked for here is asked for elsewhere; a name that no rule has is an error.
        others = [rule.pattern for rule in self.rules if rule.path not in shapes]
        return load_weights(self.folder, targets, self.rules, ignore=(*self.ignored, *others))

    def load_for(self, structure: Structure, mesh: Mesh | None = None) -> dict[str, Array]:
        """The frozen weights as a structure holds them, quantised one stack after another."""
        layout = None if mesh is None else Layout(structure.axes, mesh)
        if structure.quantization == "none":
            return self.load(structure.frozen, layout)
        held: dict[str, Array] = {}
        for path, shape in structure.parameters.items():
            value = self.load({path: shape}, layout)[path]
            if f"{path}_scale" in structure.frozen:
                found = quantize_kernel(value, structure.quantization, name=path)
                stem = path.removesuffix("kernel")
                found = {f"{stem}{leaf}": value for leaf, value in found.items()}
                held |= found if layout is None else layout.placed(found)
            else:
                held[path] = value
        return held

    def linears(self, frozen: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[LinearShape, ...]:
        """The stacked linear layers that may be adapted."""
        return weight_names.linear_shapes(self.rules, frozen)

    def tokenizer(self) -> Any:
        """The checkpoint's own tokenizer (``transformers``), never with remote code."""
        from transformers import AutoTokenizer

        if not any((self.folder / name).is_file() for name in TOKENIZER_FILES):
            # transformers would make up a BERT tokenizer that knows no word at all.
            raise InputError(
                f"{self.folder}: expected a tokenizer (tokenizer.json), got: no file of one. Save "
                "the tokenizer beside the weights."
            )
        try:
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            line = " ".join(str(error).split())[:200]
            raise InputError(
                f"{self.folder}: expected a tokenizer (tokenizer.json), got: {line} Save the "
                "tokenizer beside the weights."
            ) from error


@dataclass(frozen=True)
class Base(Checkpoint):
    """The checkpoint of a causal language model.

    Attributes:
        config: what it is.
    """

    config: DecoderConfig

    @property
    def stores_transposed(self) -> bool:
        """Whether its kernels are stored [in, out] (GPT-2's Conv1D)."""
        return self.config.model_type == "gpt2"

    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a text besides the tokenizer's EOS: Llama 3 names several."""
        file = self.folder / "generation_config.json"
        named = read_json(file).get("eos_token_id") if file.is_file() else None
        return tuple(named) if isinstance(named, list) else () if named is None else (int(named),)


@dataclass(frozen=True)
class EncoderBase(Checkpoint):
    """The checkpoint of an encoder, with or without a head.

    Attributes:
        config: what it is, with the number of labels it is opened for.
        head_rules: the weight-name table of the head.
    """

    config: EncoderConfig
    head_rules: tuple[WeightRule, ...]
    stores_transposed = False

    def stored_head(self) -> dict[str, tuple[WeightRule, tuple[int, ...]]]:
        """Those parts of the head that the checkpoint holds: path → rule and stored shape."""
        with open_tensors(self.folder) as stored:
            names = weight_names.stored_names(stored, self.rules)
            return {
                rule.path: (rule, stored[names[rule.name]].shape)
                for rule in self.head_rules
                if rule.name in names
            }

    def check_ids(self, examples: Iterable[Any]) -> None:
        """Raises InputError for a token, or its type, that no row of a table belongs to.

        Args:
            examples: with ``input_ids`` and ``token_type_ids``, as a tokenizer made them.
        """
        sizes = {"input_ids": "vocab_size"}
        if self.config.type_vocab_size > 0:
            sizes["token_type_ids"] = "type_vocab_size"
        highest = dict.fromkeys(sizes, 0)
        for example in examples:
            for name in sizes:
                highest[name] = max(highest[name], int(getattr(example, name).max()))
        for name, size in sizes.items():
            if highest[name] >= getattr(self.config, size):
                raise InputError(
                    f"{self.folder}: expected {name} below {size} {getattr(self.config, size)}, "
                    f"got {highest[name]} from its tokenizer. Use the tokenizer that belongs to "
                    "the weights."
                )

    def load_head(self, key: PRNGKeyArray) -> dict[str, Array]:
        """A head, float32: the parts that the checkpoint holds in this size, the rest new.

        A pretrained BERT has a pooler, and a fine-tuned one a classifier as well.
        """
        head = init_head(self.config, key)
        fitting = {
            path: jax.ShapeDtypeStruct(head[path].shape, np.float32)
            for path, (rule, shape) in self.stored_head().items()
            if shape == (head[path].shape[::-1] if rule.transpose else head[path].shape)
        }
        rules = (*self.rules, *self.head_rules)
        return head | load_weights(self.folder, fitting, rules, ignore=(".*",))


def open_base(name_or_path: str, revision: str | None = None) -> Base:
    """Find the checkpoint of a causal language model and read its config; nothing is loaded yet."""
    folder = find_checkpoint(resolve_path(name_or_path), revision)
    return base_of(folder, read_json_config(folder))


def open_shapes(name_or_path: str, revision: str | None = None) -> Base:
    """The same without weights: of a hub name only the config is downloaded."""
    folder = find_checkpoint(resolve_path(name_or_path), revision, weights=False)
    return base_of(folder, read_json_config(folder))


def base_of(folder: Path, raw: Mapping[str, Any]) -> Base:
    """The base that a ``config.json`` describes."""
    config = registry.decoder_config(raw, str(folder / "config.json"))
    rules = weight_names.weight_rules(config)
    return Base(folder, rules, weight_names.ignored_weights(config), config)


def open_encoder(
    name_or_path: str, revision: str | None = None, *, num_labels: int | None = None
) -> EncoderBase:
    """Find the checkpoint of an encoder and read its config; nothing is loaded yet.

    Args:
        name_or_path: a folder, or a hub name.
        revision: hub revision.
        num_labels: classes of the head, 1 for a regression; the config's own where not given.
    """
    folder = find_checkpoint(resolve_path(name_or_path), revision)
    raw, where = read_json_config(folder), str(folder / "config.json")
    if num_labels is None:
        num_labels = int(raw.get("num_labels") or len(raw.get("id2label") or (0, 1)))
    config = encoder_registry.encoder_config(raw, where, num_labels=num_labels)
    rules = encoder_registry.encoder_weight_rules(config)
    head_rules = encoder_registry.head_weight_rules(config)
    ignored = (
        *encoder_registry.encoder_ignored_weights(config),
        *(rule.pattern for rule in head_rules),
    )
    return EncoderBase(folder, rules, ignored, config, head_rules)


def is_encoder(name_or_path: str, revision: str | None = None) -> bool:
    """Whether a checkpoint is of a family of encoders."""
    raw = read_json_config(find_checkpoint(resolve_path(name_or_path), revision))
    return raw.get("model_type") in encoder_registry.PREFIXES


def head_parts(
    saved: Mapping[str, np.ndarray], rules: Sequence[WeightRule]
) -> dict[str, np.ndarray]:
    """The parts of a head among the tensors of an adapter, in our orientation."""
    return {
        rule.path: saved[rule.name].T if rule.transpose else saved[rule.name]
        for rule in rules
        if rule.name in saved
    }


def check_head(
    base: EncoderBase, saved: Mapping[str, np.ndarray], where: str, teacher_head: str
) -> None:
    """Raises InputError where an adapter brings a head that a run on labels cannot begin with."""
    brought = head_parts(saved, base.head_rules)
    outputs = len(brought.get("head.out.bias", ()))
    if brought and outputs not in (0, base.config.num_labels):
        raise InputError(
            f"{where}: expected a head of {base.config.num_labels} outputs, got one of {outputs}. "
            "Name an adapter of the same task, or the data that it was trained on."
        )
    if brought and teacher_head == "probe":
        raise InputError(
            "regularizers.teacher_head: expected student_init with an adapter that brings its "
            "head, got probe. Set it to student_init."
        )
