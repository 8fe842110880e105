"""What torch makes of checkpoints and adapters, to compare ours with."""

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from balora_jax.config_file import parse_config
from balora_jax.pretrained.export import export_run
from tests import tiny_run


def shaken(make):
    """A model that ``make`` makes, away from its initial values, the same every time."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def moved(model):
    """What trains, away from where it began."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                step = 0.3 * torch.randn(parameter.shape, generator=generator)
                parameter.add_(step if "lora" not in name else 0.3 * step)
    return model.eval()


def logits(model, ids):
    """Of a model, or of the decoder in a folder."""
    if not isinstance(model, torch.nn.Module):
        model = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        return model.eval()(torch.tensor(ids)).logits.float().numpy()


def close(got, want):
    """Equal to a ten-thousandth of the range."""
    assert got.shape == want.shape
    assert np.abs(np.asarray(got) - want).max() <= 1e-4 * np.ptp(want)


def adapted(base, run, ids):
    """Write a random adapter of PEFT on a decoder's ``q_proj`` as that of a run.

    Returns:
        The logits of the two.
    """
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(run / "adapter")
    return logits(model, ids)


def exported(base, run, out, form):
    """Our export of the adapter of a run on a base."""
    tree = tiny_run.config_tree(run)
    tree["model"]["name_or_path"] = str(base)
    export_run(parse_config(tree, "test"), run, out, format=form, rank=None)
    return out
