"""A checkpoint by its name, with and without a PEFT adapter, against transformers and peft."""

import json
import shutil
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from balora_jax.errors import InputError
from balora_jax.pretrained.checkpoint import open_base
from balora_jax.pretrained.load import load_pretrained, sampling_for
from tests import tiny_run

IDS = np.random.default_rng(0).integers(3, tiny_run.VOCAB_SIZE, (3, 11))
MASK = np.ones_like(IDS)
MASK[1, :4], MASK[2, -3:] = 0, 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_run.write_model(tmp_path_factory.mktemp("base") / "model")


def torch_model(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(IDS), attention_mask=torch.tensor(MASK)).logits.float().numpy()


def assert_same_logits(got, want, tolerance=1e-4):
    assert got.shape == want.shape
    got, want = np.asarray(got, np.float32)[MASK == 1], want[MASK == 1]
    assert np.abs(got - want).max() < tolerance * (want.max() - want.min())


def test_logits_equal_transformers(folder):
    model = load_pretrained(str(folder))
    got = model(IDS, MASK)
    assert got.dtype == jnp.float32
    assert_same_logits(got, torch_logits(torch_model(folder)))
    assert model.config.num_layers == tiny_run.LAYERS
    assert len(model.parts) == 1


def test_bfloat16(folder):
    model = load_pretrained(str(folder), dtype="bfloat16")
    assert {leaf.dtype for leaf in model.parts[0].values()} == {jnp.dtype(jnp.bfloat16)}
    got = model(IDS, MASK)
    assert got.dtype == jnp.float32
    exact = torch_logits(torch_model(folder))
    assert_same_logits(got, exact, tolerance=0.05)
    # It did compute in 16 bit.
    assert np.abs(np.asarray(got) - exact)[MASK == 1].max() > 1e-4 * (exact.max() - exact.min())


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """A LoRA adapter made and saved by PEFT, with a random B, patterns and rsLoRA."""
    options = LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"v_proj": 11},
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    model = get_peft_model(torch_model(folder), options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    out = tmp_path_factory.mktemp("peft") / "adapter"
    model.save_pretrained(out)
    return out


def test_adapter_logits_equal_peft(folder, adapter):
    model = load_pretrained(str(folder), adapter=str(adapter))
    plain = torch_logits(torch_model(folder))
    want = torch_logits(PeftModel.from_pretrained(torch_model(folder), adapter).eval())
    assert np.abs(want - plain).max() > 0.05 * (plain.max() - plain.min())
    assert_same_logits(model(IDS, MASK), want)
    frozen, constants, adapters = model.parts
    assert set(constants) == {
        f"layers.{name}.lora_scale"
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    }
    assert {leaf.dtype for leaf in adapters.values()} == {jnp.dtype(jnp.float32)}
    assert frozen.keys() == load_pretrained(str(folder)).parts[0].keys()


def test_generated_text_equals_transformers(folder):
    model, theirs = load_pretrained(str(folder)), torch_model(folder)
    prompts = ["1+2=", "40 + 2: "]
    got = model.generate(prompts, max_new_tokens=8)
    for prompt, text in zip(prompts, got, strict=True):
        ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            out = theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=8,
                do_sample=False,
                eos_token_id=2,
                pad_token_id=2,
            )
        want = model.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert text == want
        assert text


def test_open_base_loads_nothing(folder):
    base = open_base(str(folder))
    assert base.folder == folder
    assert base.config.vocab_size == tiny_run.VOCAB_SIZE
    assert len(base.fingerprint) >= 16
    assert base.fingerprint == open_base(str(folder)).fingerprint


@pytest.mark.parametrize(
    ("generation", "stops"),
    [
        ({"eos_token_id": [7, 5]}, (2, 5, 7)),
        ({"eos_token_id": 9}, (2, 9)),
        ({}, (2,)),
        (None, (2,)),
    ],
)
def test_every_stop_token_of_the_checkpoint_ends_a_text(folder, tmp_path, generation, stops):
    copied = shutil.copytree(folder, tmp_path / "model")
    (copied / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (copied / "generation_config.json").write_text(json.dumps(generation))
    base = open_base(str(copied))
    tokenizer = SimpleNamespace(eos_token_id=2, pad_token_id=0)
    assert sampling_for(base, tokenizer, 4).stop_ids == stops


def test_unknown_dtype(folder):
    with pytest.raises(InputError) as caught:
        load_pretrained(str(folder), dtype="float16")
    assert str(caught.value) == (
        "dtype: expected 'float32' or 'bfloat16', got 'float16'. Choose one."
    )


def test_missing_tokenizer(folder, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, bare / name)
    with pytest.raises(InputError) as caught:
        open_base(str(bare)).tokenizer()
    message = str(caught.value)
    assert message.startswith(f"{bare}: expected a tokenizer (tokenizer.json), got: ")
    assert message.endswith("Save the tokenizer beside the weights.")


def changed_adapter(adapter, target, change):
    """A copy of the adapter whose tensors went through ``change``."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(adapter, target)
    tensors = load_file(target / "adapter_model.safetensors")
    save_file(change(tensors), target / "adapter_model.safetensors")
    return str(target)


def test_adapter_of_another_base(folder, adapter, tmp_path):
    def renamed(tensors):
        return {name.replace("layers.1.", "layers.7."): value for name, value in tensors.items()}

    other = changed_adapter(adapter, tmp_path / "other", renamed)
    (tmp_path / "other" / "adapter_config.json").write_text(
        (adapter / "adapter_config.json").read_text().replace("layers.1.", "layers.7.")
    )
    with pytest.raises(InputError) as caught:
        load_pretrained(str(folder), adapter=other)
    assert str(caught.value) == (
        f"{other}: expected adapters for this base model, got one for "
        "'model.layers.7.mlp.down_proj', which it does not have. Name the base the adapter was "
        "trained on."
    )


def test_adapter_of_another_size(folder, adapter, tmp_path):
    def narrowed(tensors):
        return {
            name: value[:, :-4].copy() if "q_proj.lora_A" in name else value
            for name, value in tensors.items()
        }

    other = changed_adapter(adapter, tmp_path / "other", narrowed)
    with pytest.raises(InputError) as caught:
        load_pretrained(str(folder), adapter=other)
    assert str(caught.value) == (
        f"{other}: expected 16 -> 16 features at model.layers.0.self_attn.q_proj, got 12 -> 16. "
        "Name the base it was trained on."
    )


def test_unsupported_family(folder, tmp_path):
    target = tmp_path / "model"
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text()) | {"model_type": "t5"}
    (target / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InputError, match="expected model_type to be one of bert, deberta-v2, distilbert, gemma"
    ):
        load_pretrained(str(target))
