"""A pretrained checkpoint before its weights are loaded."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh

from balora_jax.array_types import Array, Int, PRNGKeyArray
from balora_jax.errors import InputError
from balora_jax.io.hf_files import (
    CONFIG_FILE,
    find_checkpoint,
    fingerprint,
    open_tensors,
    read_json_config,
)
from balora_jax.io.hf_weights import load_weights
from balora_jax.models import weight_names
from balora_jax.models.adapters import LinearShape
from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.encoder import init_head
from balora_jax.models.encoder_config import EncoderConfig
from balora_jax.models.families.base import Family, family_of, read_config
from balora_jax.models.modern_encoder import init_modern_head
from balora_jax.models.quantized import quantize_kernel
from balora_jax.models.structure import Structure
from balora_jax.models.weight_names import HEAD_NAME, WeightRule
from balora_jax.parallel import hosts
from balora_jax.parallel.axes import EXPERTS
from balora_jax.parallel.sharding import Layout
from balora_jax.paths import resolve_path
from balora_jax.pretrained.tied import head_of_its_own
from balora_jax.pretrained.tokenizer import open_tokenizer
from balora_jax.untyped.fields import Fields
from balora_jax.untyped.json_text import read_object

Config = TypeVar("Config", bound=DecoderConfig | EncoderConfig, covariant=True)


@dataclass(frozen=True)
class Checkpoint(Generic[Config]):
    """A pretrained checkpoint that was opened but not loaded.

    Attributes:
        folder: where it lies.
        config: what it is; of an encoder, with the number of labels it is opened for.
        untied: whether its ``config.json`` ties the head to the embeddings, but its files hold
            two tables that differ, so that the head is one of its own.
    """

    folder: Path
    config: Config
    untied: bool = False

    @property
    def family(self) -> Family:
        """The family that read its config."""
        return family_of(self.config)

    @property
    def rules(self) -> tuple[WeightRule, ...]:
        """The weight-name table of what stays frozen."""
        return self.family.rules(self.config)

    @property
    def head_rules(self) -> tuple[WeightRule, ...]:
        """The weight-name table of an encoder's head; empty for a decoder."""
        return self.family.head_rules()

    @property
    def stores_transposed(self) -> bool:
        """Whether its kernels are stored [in, out] (GPT-2's Conv1D)."""
        return not any(rule.transpose for rule in self.rules)

    @cached_property
    def fingerprint(self) -> str:
        """Identity of config and weights, kept with checkpoints."""
        return fingerprint(self.folder)

    def load(
        self, shapes: Mapping[str, jax.ShapeDtypeStruct], layout: Layout | None = None
    ) -> dict[str, Array]:
        """The frozen weights; each device reads its own slices, or the first one all of them.

        Experts come in the order of this config's ``expert_groups``.
        """
        targets = dict(shapes) if layout is None else layout.attached(shapes)
        # What is not asked for here is asked for elsewhere; a name that no rule has is an error.
        named = (*self.rules, *self.head_rules)
        others = [rule.pattern for rule in named if rule.path not in shapes]
        ignore = (*self.family.ignored(self.config), *others)
        return load_weights(self.folder, targets, self.rules, ignore=ignore)

    def load_for(self, structure: Structure, mesh: Mesh | None = None) -> dict[str, Array]:
        """The frozen weights as a structure holds them, quantised one stack after another."""
        layout = None if mesh is None else Layout(structure.axes, mesh)
        if mesh is not None and isinstance(self.config, DecoderConfig):
            config = replace(self.config, expert_groups=mesh.shape[EXPERTS])
            if config != self.config:
                return replace(self, config=config).load_for(structure, mesh)
        if structure.quantization == "none":
            return self.load(structure.frozen, layout)
        held: dict[str, Array] = {}
        for path, shape in structure.parameters.items():
            value = self.load({path: shape}, layout)[path]
            if f"{path}_scale" in structure.frozen:
                groups = self.groups_of(path)
                found = quantize_kernel(value, structure.quantization, name=path, groups=groups)
                stem = path.removesuffix("kernel")
                found = {f"{stem}{leaf}": value for leaf, value in found.items()}
                held |= found if layout is None else layout.placed(found)
            else:
                held[path] = value
        return held

    def groups_of(self, path: str) -> int:
        """Groups of devices that the layers of a stack are spread over."""
        return next(rule.groups for rule in self.rules if rule.path == path)

    def linears(self, frozen: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[LinearShape, ...]:
        """The stacked linear layers that may be adapted."""
        return weight_names.linear_shapes(self.rules, frozen)

    def tokenizer(self) -> Any:
        """The checkpoint's own tokenizer (``transformers``), never with remote code."""
        return open_tokenizer(self.folder)

    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a text besides the tokenizer's EOS: Llama 3 names several.

        Raises:
            InputError: a ``generation_config.json`` that is broken or names no rows of the table.
        """
        file = self.folder / "generation_config.json"
        if not file.is_file():
            return ()
        remedy = "Use the generation_config.json that was saved with the weights."
        named = Fields(read_object(file), str(file), remedy)
        return named.integers("eos_token_id", most=self.config.vocab_size - 1)

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
        """Raises InputError for a token, or its type, that no row of the model's table belongs to.

        Args:
            examples: with ``input_ids`` and, for an encoder, ``token_type_ids``, as a tokenizer
                made them.
        """
        sizes = {"input_ids": "vocab_size"}
        if getattr(self.config, "type_vocab_size", 0) > 0:
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

    def check_prompts(self, prompts: Iterable[Sequence[int]], new_tokens: int) -> None:
        """Raises InputError for a prompt of which the model has no token, or no position.

        Args:
            prompts: token ids of each.
            new_tokens: most that is to be written after it.
        """
        vocabulary, positions = self.config.vocab_size, self.config.max_length
        for number, prompt in enumerate(prompts, start=1):
            if max(prompt, default=0) >= vocabulary:
                raise InputError(
                    f"prompt {number}: expected token ids below vocab_size {vocabulary}, got "
                    f"{max(prompt)} from the tokenizer of {self.folder}. Use the tokenizer that "
                    "belongs to the weights."
                )
            if len(prompt) + new_tokens > positions:
                raise InputError(
                    f"prompt {number}: expected prompt and answer within the {positions} positions "
                    f"of {self.folder.name}, got {len(prompt)} tokens and max_new_tokens "
                    f"{new_tokens}. Shorten the prompt or lower max_new_tokens."
                )

    def checked_ids(self, input_ids: Any) -> Int[Array, "B T"]:
        """Rows of tokens as int32; what is being traced cannot be looked at.

        Raises:
            InputError: an id without a row in the table, or a row longer than the positions.
        """
        ids = jnp.asarray(input_ids, jnp.int32)
        vocabulary, positions = self.config.vocab_size, self.config.max_length
        if ids.shape[-1] > positions:
            raise InputError(
                f"input_ids: expected rows of at most {positions} tokens, got {ids.shape[-1]}. "
                "Cut them."
            )
        if not isinstance(ids, Tracer) and ids.size:
            for found in (int(ids.min()), int(ids.max())):
                if not 0 <= found < vocabulary:
                    raise InputError(
                        f"input_ids: expected ids from 0 to {vocabulary - 1}, got {found}. Use the "
                        f"tokenizer of {self.folder}."
                    )
        return ids

    def padding_id(self, tokenizer: Any) -> int:
        """A row of the table for places without a token.

        An encoder may count positions by it, so its config comes first; then the tokenizer's
        padding or EOS; row 0 where these lie outside the table.
        """
        named = (
            getattr(self.config, "pad_token_id", None),
            tokenizer.pad_token_id,
            tokenizer.eos_token_id,
        )
        inside = (one for one in named if one is not None and 0 <= one < self.config.vocab_size)
        return int(next(inside, 0))

    def load_head(self: "Checkpoint[EncoderConfig]", key: PRNGKeyArray) -> dict[str, Array]:
        """A head, float32: the parts that the checkpoint holds in this size, the rest new.

        A pretrained BERT has a pooler, and a fine-tuned one a classifier as well.
        """
        modern = self.config.modern
        head = init_head(self.config, key)
        if modern is not None:
            head = init_modern_head(self.config, modern, key)
        fitting = {
            path: jax.ShapeDtypeStruct(head[path].shape, np.float32)
            for path, (rule, shape) in self.stored_head().items()
            if shape == (head[path].shape[::-1] if rule.transpose else head[path].shape)
        }
        rules = (*self.rules, *self.head_rules)
        return head | load_weights(self.folder, fitting, rules, ignore=(".*",))


Base = Checkpoint[DecoderConfig]
EncoderBase = Checkpoint[EncoderConfig]


def open_base(name_or_path: str, revision: str | None = None, *, weights: bool = True) -> Base:
    """Find the checkpoint of a causal language model and read its config; nothing is loaded yet.

    A config that ties the head to the embeddings is not believed where the files hold two tables
    that differ; that is said.

    Args:
        name_or_path: a folder, or a hub name.
        revision: hub revision.
        weights: whether there must be weights; without, of a hub name only the config is
            downloaded.
    """
    folder = find_checkpoint(resolve_path(name_or_path), revision, weights=weights)
    config = _config_of(folder, kind="decoder")
    if not weights or not head_of_its_own(folder, config):
        return Checkpoint(folder, config)
    hosts.warn(
        f"{folder}: its {HEAD_NAME} is not its embeddings, as tie_word_embeddings in {CONFIG_FILE} "
        "says; the stored head is used"
    )
    return Checkpoint(folder, replace(config, tie_word_embeddings=False), untied=True)


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
    return Checkpoint(folder, _config_of(folder, kind="encoder", num_labels=num_labels))


def is_encoder(name_or_path: str, revision: str | None = None) -> bool:
    """Whether a checkpoint is of a family of encoders."""
    folder = find_checkpoint(resolve_path(name_or_path), revision)
    return family_of(_config_of(folder)).kind == "encoder"


def _config_of(folder: Path, **options: Any) -> Any:
    return read_config(read_json_config(folder), str(folder / CONFIG_FILE), **options)


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
