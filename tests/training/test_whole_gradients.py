"""Embeddings, head and norms that train whole: loss and gradients against PEFT's model in torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from balora_jax.config_file import parse_config
from balora_jax.models.whole import TOKEN_ROWS, stored
from balora_jax.pretrained.checkpoint import open_base
from balora_jax.tasks.text.program import text_program
from balora_jax.training.run import Loaded
from tests.training.test_gradients import CASES, LAMBDAS, MARKED, POSITIONS, SEGMENTS, torch_loss

IDS = np.where(SEGMENTS > 0, np.random.default_rng(3).integers(3, 59, SEGMENTS.shape), 0)
TOKENS = [int(IDS[0, 1]), int(IDS[0, 4]), int(IDS[1, 3])]
TRAINED = {
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "norms": {"modules_to_save": ["norm"]},
    "all": {"modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "tokens": {"trainable_token_indices": TOKENS},
}


def made(folder, tied, trained):
    """A base and PEFT's model on it, some way off its start."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        tie_word_embeddings=tied, initializer_range=0.3,
    )  # fmt: skip
    teacher = LlamaForCausalLM(config)
    teacher.save_pretrained(folder / "base")
    student = LlamaForCausalLM.from_pretrained(folder / "base")
    lora = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"],
                      task_type="CAUSAL_LM", **trained)  # fmt: skip
    student = get_peft_model(student, lora)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    student.save_pretrained(folder / "adapter")
    return student.double(), teacher.double()


def ours(folder, head, variant):
    """Loss, its parts and gradients by path; and what they are of."""
    case = CASES[variant]
    tree = {
        "model": {"name_or_path": str(folder / "base")},
        "adapter": {"start": str(folder / "adapter")},
        "regularizers": {
            **dict(zip(("consistency", "diversity", "spectral"), LAMBDAS, strict=True)),
            "variant": variant, "k": 4, "mask_alignment": case["alignment"],
        },
        "data": {"train": "rows.jsonl", "max_length": 11},
        "training": {"max_steps": 3, "head": head, "head_chunk": 5},
        "mesh": {"data": 1},
    }  # fmt: skip
    config = parse_config(tree, "here")
    base = open_base(str(folder / "base"))
    program = text_program(config, base.config)
    frozen = base.load_for(program.plain, program.mesh)
    trainable, origin = program.adapters.begin(frozen, config.model, program.layout, seed=0)
    constants = program.constants(Loaded(frozen, origin, trainable))
    assert (constants.head_factor is None) == (
        head == "plain" or program.adapters.trains_head(base.config)
    )
    batch = {"input_ids": IDS, "positions": POSITIONS, "segment_ids": SEGMENTS, "loss_mask": MARKED}
    batch = {name: jnp.asarray(value, jnp.int32) for name, value in batch.items()}
    parts = program.step_parts(3)
    counts = parts.counts({name: value[None] for name, value in batch.items()})
    weights = {name: jnp.float32(value) for name, value in
               zip(("consistency", "diversity", "spectral"), LAMBDAS, strict=True)}  # fmt: skip

    @jax.jit
    def measure(trainable, constants, batch):
        both = jax.value_and_grad(parts.loss, has_aux=True)
        return both(trainable, constants, batch, counts, weights, None)

    (loss, values), gradients = measure(trainable, constants, batch)
    return float(loss), values, gradients, program


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("head", "variant", "trained"),
    [
        *(("fused", "iclr2026", trained) for trained in TRAINED),
        # The plain head is an ordinary product: what trains together, and what is stored apart.
        ("plain", "iclr2026", "all"),
        ("plain", "iclr2026", "tokens"),
        ("plain", "arxiv_v1", "all"),
    ],
)
def test_loss_and_gradients(tmp_path, tied, head, variant, trained):
    student, teacher = made(tmp_path, tied, TRAINED[trained])
    want, parts, _ = torch_loss((student, teacher), IDS, **CASES[variant], k=4)
    want.backward()
    loss, values, gradients, program = ours(tmp_path, head, variant)
    assert loss == pytest.approx(want.item(), rel=1e-5)
    for name, value in parts.items():
        assert float(values[name]) == pytest.approx(value.item(), rel=1e-5), name
    expected = {
        name.removeprefix("base_model.model.").replace(".modules_to_save.default", ""): p.grad
        for name, p in student.named_parameters()
        if p.grad is not None
    }
    whole = program.adapters.whole
    found = stored(whole, gradients)
    if TOKEN_ROWS in gradients:
        name = next(n for n in expected if "trainable_tokens_delta" in n)
        found[name] = np.asarray(gradients[TOKEN_ROWS])
    for module in program.adapters.modules:
        for side in "AB":
            value = gradients[f"{module.path}.lora_{side.lower()}"][module.layer]
            found[f"{module.name}.lora_{side}.default.weight"] = np.asarray(value).T
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        got, exact = np.asarray(found[name], np.float64), value.numpy()
        assert np.abs(exact).max() > 1e-6, name
        assert np.abs(got - exact).max() < 2e-5 * np.abs(exact).max(), name
