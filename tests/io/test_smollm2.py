"""A real small model, where it is there: its logits are those of transformers.

``BALORA_SMOLLM2`` names its folder; without it ``../shared/models/SmolLM2-135M-Instruct`` is tried.
"""

import os
from pathlib import Path

import numpy as np
import pytest

from balora_jax.pretrained.load import load_pretrained

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(
    os.environ.get("BALORA_SMOLLM2", ROOT.parent / "shared" / "models" / "SmolLM2-135M-Instruct")
)
TEXT = "Generate a list of names for a fantasy novel set in a medieval-style world."


@pytest.mark.skipif(not (FOLDER / "config.json").is_file(), reason="SmolLM2 is not here")
def test_logits_of_smollm2():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    ids = transformers.AutoTokenizer.from_pretrained(FOLDER)(TEXT)["input_ids"]
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits.numpy()
    got = np.asarray(load_pretrained(str(FOLDER))(np.array([ids])))
    assert np.abs(got - want).max() < 1e-4 * np.ptp(want)
