"""Families × what trains whole × vocabularies: adapters that PEFT makes, and what they compute.

A part of the table by default, all of it with ``BALORA_PEFT_TABLE=all``.
"""

import os
from typing import NamedTuple

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.io.torch_side import logits, moved
from tests.models import tiny_encoders
from tests.models.tiny_families import FAMILIES as DECODERS

ENCODERS = {
    "bert": tiny_encoders.bert,
    "roberta": tiny_encoders.roberta,
    "deberta_v2": tiny_encoders.deberta,
    "distilbert": tiny_encoders.distilbert,
    "modernbert": tiny_encoders.modernbert,
}
SAVED = ("head", "embeddings", "norms", "all", "tokens")
VOCABULARIES = ("tied", "untied", "resized", "tied and resized")
MORE_TOKENS = 6


class Names(NamedTuple):
    """Of a family's modules, by their ends, as PEFT has them."""

    targets: list[str]
    head: list[str]
    embeddings: list[str]
    norms: list[str]

    def of(self, saved):
        """Those of a kind."""
        kinds = self._asdict() | {"all": [*self.embeddings, *self.head, *self.norms]}
        return kinds[saved]


NORMS = ["attn_norm", "mlp_norm", "final_norm", "embeddings.norm"]  # PEFT nests none in "head"
BERT_TABLES = ["word_embeddings", "position_embeddings"]
USUAL = Names(["q_proj", "v_proj"], ["lm_head"], ["embed_tokens"], ["norm"])
NAMES = {
    "phi3": USUAL._replace(targets=["qkv_proj"]),
    "gpt2": Names(["c_attn"], ["lm_head"], ["wte", "wpe"], ["ln_1", "ln_2", "ln_f"]),
    "bert": Names(
        ["query"], ["classifier"], [*BERT_TABLES, "token_type_embeddings"], ["LayerNorm"]
    ),
    "roberta": Names(["query"], ["classifier"], BERT_TABLES, ["LayerNorm"]),
    "deberta_v2": Names(
        ["query_proj"],
        ["pooler", "classifier"],
        ["word_embeddings", "rel_embeddings"],
        ["LayerNorm"],
    ),
    "distilbert": Names(
        ["q_lin"], ["pre_classifier", "classifier"], BERT_TABLES, ["layer_norm", "LayerNorm"]
    ),
    "modernbert": Names(["Wqkv"], ["head", "classifier"], ["tok_embeddings"], NORMS),
}


class Row(NamedTuple):
    """One of the table."""

    family: str
    saved: str
    vocabulary: str

    @property
    def is_encoder(self):
        return self.family in ENCODERS

    @property
    def title(self):
        return ", ".join(self)


def absent(row):
    """Why the table has no such row; nothing where it has."""
    if row.is_encoder and row.vocabulary.startswith("tied"):
        return "an encoder that scores classes has no head of its embeddings"
    if row.is_encoder and row.saved == "tokens":
        return "rows of tokens train in decoders"
    return ""


EVERY = [Row(f, s, v) for f in (*DECODERS, *ENCODERS) for s in SAVED for v in VOCABULARIES]
ROWS = {row.title: row for row in EVERY if not absent(row)}


def default():
    """One row of each family; the decoders' meet every kind and every vocabulary."""
    every = [(s, v) for s in SAVED for v in VOCABULARIES]
    found = [Row(family, *every[9 * i % len(every)]) for i, family in enumerate(DECODERS)]
    found += [Row(f, SAVED[i % 4], VOCABULARIES[1 + i % 2]) for i, f in enumerate(ENCODERS)]
    return {row.title: row for row in found}


CASES = ROWS if os.environ.get("BALORA_PEFT_TABLE") == "all" else default()


def plain(row):
    """The family's model without an adapter."""
    if row.is_encoder:
        return ENCODERS[row.family]()
    return DECODERS[row.family](tie_word_embeddings=row.vocabulary.startswith("tied"))


def read(row, folder):
    """The model of a folder in transformers."""
    auto = AutoModelForSequenceClassification if row.is_encoder else AutoModelForCausalLM
    return auto.from_pretrained(folder, attn_implementation="eager").eval()


def widened(row, model):
    """A base with the row's vocabulary."""
    if row.vocabulary.endswith("resized"):
        count = model.config.vocab_size + MORE_TOKENS
        model.resize_token_embeddings(count, mean_resizing=False)
    return model


def make(row, folder):
    """A base in ``folder/base`` and the adapter that PEFT trained on it in ``folder/run/adapter``.

    Returns:
        What PEFT makes of the two files, and from ids to the logits of the base.
    """
    torch.manual_seed(0)
    plain(row).save_pretrained(folder / "base")
    # From its files: beside them PEFT sees that a vocabulary was resized.
    base = widened(row, read(row, folder / "base"))
    names = NAMES.get(row.family, USUAL)
    if row.saved == "tokens":
        whole = {"trainable_token_indices": [5, base.config.vocab_size - 1]}
    else:
        whole = {"modules_to_save": names.of(row.saved)}
    config = LoraConfig(
        r=2, lora_alpha=3, target_modules=names.targets, **whole,
        task_type="SEQ_CLS" if row.is_encoder else "CAUSAL_LM",
        fan_in_fan_out=row.family == "gpt2",
    )  # fmt: skip
    adapted = moved(get_peft_model(base, config))
    adapted.save_pretrained(folder / "run" / "adapter")

    def before(given):
        with adapted.disable_adapter():
            return logits(adapted, given)

    return theirs(row, folder / "base", folder / "run" / "adapter"), before


def ids(model):
    """Rows of ids, the last of the vocabulary among them."""
    count = model.config.vocab_size
    found = np.random.default_rng(1).integers(4, count, (2, 11))
    found[:, 3:5] = count - 1, 5
    return found


def theirs(row, base, adapter):
    """PEFT's model of an adapter on a base."""
    return PeftModel.from_pretrained(widened(row, read(row, base)), adapter).eval()
