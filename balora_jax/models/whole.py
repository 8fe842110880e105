"""Weights that train whole beside adapters: embeddings, heads and norms.

PEFT's ``modules_to_save`` names modules by the ends of their names, and its adapter folders hold
their tensors as the checkpoint would. ``trainable_token_indices`` is the same for single rows of
the token embeddings.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from balora_jax.errors import InputError
from balora_jax.models.decoder_config import EMBEDDING, HEAD, DecoderConfig
from balora_jax.models.encoder_config import EncoderConfig
from balora_jax.models.weight_names import HEAD_NAME, WeightRule

TOKEN_ROWS = "embed_tokens.rows"
"""Path of the rows of single tokens, [n, D], which take the place of those of the table."""

HEAD_RULE = WeightRule(HEAD, HEAD_NAME, False)
"""Of the head that a tied checkpoint has not."""

_WHERE = "adapter.modules_to_save"

Config = DecoderConfig | EncoderConfig
Shapes = Mapping[str, jax.ShapeDtypeStruct]


@dataclass(frozen=True)
class Whole:
    """Weights of a model that train whole.

    Attributes:
        names: of their modules, as PEFT has them.
        rules: the weight-name table of these weights.
        unties: the model's head was its embedding table, and is no longer.
        tokens: rows of the embedding table that train alone.
    """

    names: tuple[str, ...] = ()
    rules: tuple[WeightRule, ...] = ()
    unties: bool = False
    tokens: tuple[int, ...] = ()

    @property
    def paths(self) -> set[str]:
        """Our paths of the weights."""
        return {rule.path for rule in self.rules}

    def trains_head(self, config: DecoderConfig) -> bool:
        """Whether the table that scores the vocabulary is among them; ``config`` of the base."""
        tied = config.tie_word_embeddings and not self.unties
        return HEAD in self.paths or (tied and bool({EMBEDDING} & self.paths or self.tokens))

    def of(self, config: Any) -> Any:
        """The config of the model with these weights of its own, from that of the base."""
        return replace(config, tie_word_embeddings=False) if self.unties else config

    @property
    def aliases(self) -> dict[str, str]:
        """Weights that the model has and the checkpoint has not → the one they begin as."""
        return {HEAD: EMBEDDING} if self.unties else {}

    def shapes(self, frozen: Shapes) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of what trains, float32."""
        found = {
            rule.path: frozen[self.aliases.get(rule.path, rule.path)].shape for rule in self.rules
        }
        if self.tokens:
            found[TOKEN_ROWS] = (len(self.tokens), *frozen[EMBEDDING].shape[1:])
        return {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in found.items()}


NOTHING = Whole()


def whole_of(
    names: Sequence[str],
    tokens: Sequence[int],
    config: Config,
    rules: Sequence[WeightRule],
    frozen: Shapes,
) -> Whole:
    """What trains whole, by the names of modules.

    Args:
        names: ends of the names of embeddings, heads and norms, as in PEFT.
        tokens: ids whose rows of the embedding table train alone.
        config: of the model.
        rules: the weight-name table of what is frozen without.
        frozen: its shapes.

    Raises:
        InputError: a name that no such module has, or that only some layers have; a linear layer;
            an id outside the table.
    """
    tied = isinstance(config, DecoderConfig) and config.tie_word_embeddings
    table = (*rules, HEAD_RULE) if tied else tuple(rules)
    chosen = [rule for rule in table if _is_chosen(rule, names, frozen)]
    for name in names:
        if not any(belongs_to(one, [name]) for rule in chosen for one in _tensors(rule, frozen)):
            known = sorted({rule.name.split(".")[-2] for rule in table if _may_train(rule)})
            raise InputError(
                f"{_WHERE}: expected the name of an embedding, a head or a norm, got {name!r}. "
                f"This model has {', '.join(known)}."
            )
    paths = {rule.path for rule in chosen}
    _check_tokens(tokens, config, paths)
    return Whole(
        tuple(names), tuple(chosen), tied and bool({EMBEDDING, HEAD} & paths), tuple(tokens)
    )


def _check_tokens(tokens: Sequence[int], config: Config, paths: set[str]) -> None:
    where = "adapter.trainable_token_indices"
    if not tokens:
        return
    if not isinstance(config, DecoderConfig):
        raise InputError(f"{where}: expected none with task labels, got some. Leave it out.")
    if len(set(tokens)) < len(tokens) or not all(0 <= i < config.vocab_size for i in tokens):
        raise InputError(
            f"{where}: expected different ids from 0 to {config.vocab_size - 1}, got "
            f"{list(tokens)[:20]}. Correct them."
        )
    if EMBEDDING in paths:
        raise InputError(
            f"{where}: expected none where adapter.modules_to_save names the embeddings, got some: "
            "all rows train. Leave one of them out."
        )


def belongs_to(tensor: str, modules_to_save: Sequence[str]) -> bool:
    """Whether a tensor lies in one of the modules, named as PEFT names them: by their ends.

    >>> belongs_to("bert.pooler.dense.bias", ["pooler"]), belongs_to("bert.dense.bias", ["pooler"])
    (True, False)
    """
    parts = tensor.split(".")
    parents = [".".join(parts[:i]) for i in range(1, len(parts))]
    return any(parent.endswith(name) for parent in parents for name in modules_to_save)


def _may_train(rule: WeightRule) -> bool:
    """Whether a weight is of an embedding, a head or a norm."""
    norm = re.search(r"norm|\.ln_", rule.path, re.IGNORECASE) is not None
    return rule.path.endswith((".scale", ".embedding")) or (rule.path.endswith(".bias") and norm)


def _is_chosen(rule: WeightRule, names: Sequence[str], frozen: Shapes) -> bool:
    tensors = _tensors(rule, frozen)
    found = [belongs_to(tensor, names) for tensor in tensors]
    if not any(found):
        return False
    first = tensors[found.index(True)].rpartition(".")[0]
    if not _may_train(rule):
        raise InputError(
            f"{_WHERE}: expected embeddings, heads and norms, got the linear layer {first}. Adapt "
            "it with adapter.target_modules."
        )
    if not all(found):
        raise InputError(
            f"{_WHERE}: expected a module of all layers, got one of some layers only ({first}). "
            "Leave out its number."
        )
    return True


def _tensors(rule: WeightRule, frozen: Shapes) -> tuple[str, ...]:
    """The checkpoint's tensors of a weight, one for each layer."""
    return rule.names(frozen[rule.path].shape[0] if rule.stacked else 1)


def begun(whole: Whole, saved: Mapping[str, np.ndarray], frozen: Mapping[str, Any]) -> dict:
    """What trains whole at step 0, float32: the base's own values, or those that were saved.

    Args:
        whole: what it is.
        saved: tensors by checkpoint name; rows of tokens under ``TOKEN_ROWS``.
        frozen: the base's weights by path.
    """
    begin: dict[str, Any] = {}
    for rule in whole.rules:
        base = frozen[whole.aliases.get(rule.path, rule.path)]
        begin[rule.path] = with_saved(rule, saved, base)
    if whole.tokens:
        rows = saved.get(TOKEN_ROWS)
        begin[TOKEN_ROWS] = frozen[EMBEDDING][np.asarray(whole.tokens)] if rows is None else rows
    return begin


def with_saved(rule: WeightRule, saved: Mapping[str, np.ndarray], base: Any) -> Any:
    """A weight with the saved tensors of its layers in place of the base's; as it is without."""
    layers = base.shape[0] if rule.stacked else 1
    there = [(i, name) for i, name in enumerate(rule.names(layers)) if name in saved]
    if not there:
        return base
    values = [saved[name].T if rule.transpose else saved[name] for _, name in there]
    if not rule.stacked:
        return np.asarray(values[0], np.float32)
    whole = np.array(base, np.float32)
    for (layer, _), value in zip(there, values, strict=True):
        whole[layer] = value
    return whole


def stored(whole: Whole, trained: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of what trained whole, by checkpoint name and as stored there."""
    found = {}
    for rule in whole.rules:
        value = np.asarray(trained[rule.path], np.float32)
        parts = value if rule.stacked else [value]
        for name, part in zip(rule.names(len(value)), parts, strict=True):
            found[name] = np.ascontiguousarray(part.T if rule.transpose else part)
    return found
