"""What an adapter trained whole (PEFT's ``modules_to_save``), on its base."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from balora_jax.errors import InputError
from balora_jax.io.hf_files import shortened
from balora_jax.io.peft_reader import PeftAdapter
from balora_jax.models.decoder_config import EMBEDDING, HEAD, DecoderConfig
from balora_jax.models.families.base import family_of, weight_rules
from balora_jax.models.weight_names import WeightRule
from balora_jax.models.whole import HEAD_RULE, TOKEN_ROWS, Config, Whole, belongs_to
from balora_jax.pretrained.peft_start import PeftStart
from balora_jax.untyped.shown import shown

Shapes = Mapping[str, jax.ShapeDtypeStruct]


def saved_whole(peft: PeftAdapter, config: Config, frozen: Shapes, where: str) -> tuple[Any, Whole]:
    """The config of the adapted model, and its weights of its own.

    Args:
        peft: the adapter.
        config: of the base.
        frozen: shapes of its weights, before any quantisation.
        where: the adapter's folder.

    Returns:
        The base's config, with the vocabulary of the saved tables; and what was saved of weights
        that otherwise stay frozen. An encoder's head is not among them.

    Raises:
        InputError: a saved tensor that is of no weight of the base, or has another shape; one that
            is missing; tables of different vocabularies; a tied head that is not the embedding
            table.
    """
    tied = isinstance(config, DecoderConfig) and config.tie_word_embeddings
    rules = (*weight_rules(config), *([HEAD_RULE] if tied else []))
    shapes = {**frozen, HEAD: frozen[EMBEDDING]} if tied else frozen
    of_tokens = config.token_table, HEAD
    head = family_of(config).head_rules()
    _check_places(peft, rules, of_tokens, head, shapes, where)
    _check_complete(peft, [n for rule in rules for n in _names(rule, shapes)], head, tied, where)
    tables = [rule for rule in rules if rule.path in of_tokens and rule.name in peft.saved]
    unties = tied and any(belongs_to(rule.name, peft.modules_to_save) for rule in tables)
    chosen = [rule for rule in rules if any(n in peft.saved for n in _names(rule, shapes))]
    if tied and not unties and HEAD_RULE in chosen:
        _check_tied(peft, where)
        chosen.remove(HEAD_RULE)
    apart = isinstance(config, DecoderConfig) and (unties or not tied)
    vocabulary = _vocabulary(peft, tables, config, apart, where)
    if vocabulary is not None:
        config = replace(config, vocab_size=vocabulary)
    return config, Whole(peft.modules_to_save, tuple(chosen), unties, peft.tokens)


def check_vocabulary(config: Config, base: Config, where: str) -> None:
    """Raises InputError where training would go on with another vocabulary than the teacher's."""
    if config.vocab_size != base.vocab_size:
        raise InputError(
            f"{where}: expected a vocabulary of {base.vocab_size} as the base has, got "
            f"{config.vocab_size}. Merge it first (balora export --format merged), and name the "
            "new folder as model.name_or_path."
        )


def check_tables(start: PeftStart, tables: Sequence[WeightRule], frozen: Mapping[str, Any]) -> None:
    """Raises InputError where a start brings a table that is not the base's and does not train.

    PEFT saves tables that it did not train with ``save_embedding_layers=True``.
    """
    for rule in tables:
        base, name = frozen[rule.path], rule.name
        if not jnp.array_equal(jnp.asarray(start.saved[name], base.dtype), base):
            raise InputError(
                f"{start.folder}: expected {name} to be the base's, as modules_to_save does not "
                f"name it, got another. Train it (adapter.modules_to_save: "
                f"[{name.split('.')[-2]}]), or merge the adapter first."
            )


def _names(rule: WeightRule, shapes: Shapes) -> tuple[str, ...]:
    return rule.names(shapes[rule.path].shape[0] if rule.stacked else 1)


def _check_places(
    peft: PeftAdapter,
    rules: Sequence[WeightRule],
    of_tokens: Collection[str],
    head: Sequence[WeightRule],
    shapes: Shapes,
    where: str,
) -> None:
    places = {
        name: (rule, shapes[rule.path].shape) for rule in rules for name in _names(rule, shapes)
    }
    of_head = {rule.name for rule in head}
    for name, value in peft.saved.items():
        if name == TOKEN_ROWS:
            table = next(rule.name for rule in rules if rule.path == EMBEDDING)
            _check_rows(peft, value, peft.saved.get(table, shapes[EMBEDDING]).shape, where)
            continue
        if name in of_head:
            continue
        if name not in places:
            raise InputError(
                f"{where}: expected tensors of weights that the base has, got {name}. Name the "
                "base the adapter was trained on."
            )
        rule, shape = places[name]
        shape = shape[1:] if rule.stacked else shape
        wanted = shape[::-1] if rule.transpose else shape
        resized = rule.path in of_tokens and value.shape[1:] == wanted[1:]
        if value.shape != wanted and not resized:
            raise InputError(
                f"{where}: expected {name} of shape {list(wanted)}, got {list(value.shape)}. Name "
                "the base the adapter was trained on."
            )


def _check_complete(
    peft: PeftAdapter, names: Sequence[str], head: Sequence[WeightRule], tied: bool, where: str
) -> None:
    """Raises InputError where what ``modules_to_save`` names is not in the file as a whole."""
    known = [*names, *(rule.name for rule in head)]
    if tied and peft.config.get("ensure_weight_tying"):
        known.remove(HEAD_RULE.name)  # one tensor for both
    missing = [
        name for name in known if belongs_to(name, peft.modules_to_save) and name not in peft.saved
    ]
    if missing:
        raise InputError(
            f"{where}: expected the tensors of every module in modules_to_save "
            f"({', '.join(map(shown, peft.modules_to_save))}), got none of {shortened(missing)}. "
            "Use the two files that were saved together."
        )


def _check_rows(peft: PeftAdapter, rows: np.ndarray, table: tuple[int, ...], where: str) -> None:
    if rows.shape[1] != table[1] or max(peft.tokens) >= table[0]:
        raise InputError(
            f"{where}: expected rows of {table[1]} numbers of tokens below {table[0]}, got "
            f"{rows.shape[1]} and token {max(peft.tokens)}. Name the base the adapter was trained "
            "on."
        )


def _check_tied(peft: PeftAdapter, where: str) -> None:
    """The base's head is its embedding table: what was saved of both must be one."""
    tables = [peft.saved[name] for name in peft.saved if name.endswith(("embed_tokens.weight",
              "wte.weight"))]  # fmt: skip
    if not tables or not np.array_equal(tables[0], peft.saved[HEAD_RULE.name]):
        raise InputError(
            f"{where}: expected the saved head of a tied base to be its embedding table, got "
            "another. Name both in modules_to_save when the adapter is trained."
        )


def _vocabulary(
    peft: PeftAdapter,
    tables: Sequence[WeightRule],
    config: Config,
    apart: bool,
    where: str,
) -> int | None:
    """Entries of the saved tables where they are others than the base's."""
    counts = {len(peft.saved[rule.name]) for rule in tables}
    own = config.vocab_size
    if not counts - {own}:
        return None
    if len(counts) > 1 or (apart and len(tables) < 2):
        raise InputError(
            f"{where}: expected embeddings and head of one vocabulary, got tables of "
            f"{', '.join(map(str, sorted(counts | {own})))} entries. Save both tables."
        )
    return counts.pop()
