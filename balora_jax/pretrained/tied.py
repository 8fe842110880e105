"""Heads that share the table of the embeddings, as the files hold them."""

from pathlib import Path

import numpy as np

from balora_jax.io.hf_files import FLOAT_DTYPES, StoredTensor, open_tensors
from balora_jax.models.decoder_config import EMBEDDING, DecoderConfig
from balora_jax.models.families.base import weight_rules
from balora_jax.models.weight_names import HEAD_NAME, stored_names

_ROWS = 4096


def head_of_its_own(folder: Path, config: DecoderConfig) -> bool:
    """Whether a config ties the head to the embeddings and the files hold two that differ.

    ``transformers`` then takes the stored head (from version 5 on; before, it took the
    embeddings). Nothing of two equal tables, or of one, makes a difference.
    """
    if not config.tie_word_embeddings:
        return False
    rules = weight_rules(config)
    table = next(rule.name for rule in rules if rule.path == EMBEDDING)
    with open_tensors(folder) as stored:
        names = stored_names(stored, rules)
        if HEAD_NAME not in names or table not in names:
            return False
        return not _equal(stored[names[HEAD_NAME]], stored[names[table]])


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors hold the same numbers, some rows at a time."""
    if one.shape != other.shape or not {one.dtype, other.dtype} <= set(FLOAT_DTYPES):
        return False
    rows = one.shape[0] if one.shape else 0
    parts = (slice(start, min(start + _ROWS, rows)) for start in range(0, rows, _ROWS))
    with one.mapped() as mine, other.mapped() as theirs:
        return all(np.array_equal(mine[part], theirs[part]) for part in parts)
