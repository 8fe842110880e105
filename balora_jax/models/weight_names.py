"""Names of arrays in a Hugging Face checkpoint, and what follows from a table of them."""

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import jax

from balora_jax.models.adapters import LinearShape
from balora_jax.models.decoder_config import EMBEDDING, HEAD

HEAD_NAME = "lm_head.weight"
"""The name of a decoder's head in every checkpoint."""


@dataclass(frozen=True)
class WeightRule:
    """Place of one of our arrays in a checkpoint.

    Attributes:
        path: our dotted path, ``layers.self_attn.q_proj.kernel``.
        name: the checkpoint's name, with ``{i}`` for the layer of a stacked array and ``{e}`` for
            the expert.
        transpose: whether the checkpoint stores [out, in] where we hold [in, out].
        experts: tensors of one layer.
        first: the layer of the first one.
        groups: of experts, see ``DecoderConfig.expert_groups``.
    """

    path: str
    name: str
    transpose: bool
    experts: int = 1
    first: int = 0
    groups: int = 1

    @property
    def stacked(self) -> bool:
        """Whether our array stacks the checkpoint's tensors on its leading axis."""
        return "{i}" in self.name

    def names(self, count: int) -> tuple[str, ...]:
        """Names of the checkpoint's tensors, in the order of our array's leading axis."""
        if not self.stacked:
            return (self.name,)
        layers, own = count // self.experts, self.experts // self.groups
        places = itertools.product(range(self.groups), range(layers), range(own))
        return tuple(
            self.name.format(i=i + self.first, e=group * own + e) for group, i, e in places
        )

    @property
    def pattern(self) -> str:
        """A regular expression of the checkpoint's names."""
        name = self.name.replace("{i}", "0").replace("{e}", "0")
        return "^" + re.sub(r"(?<=\\.)0(?=\\.)", r"\\d+", re.escape(name)) + "$"


def linear_shapes(
    rules: Iterable[WeightRule], frozen: Mapping[str, jax.ShapeDtypeStruct]
) -> tuple[LinearShape, ...]:
    """The stacked linear layers that may be adapted (the head and embeddings stay frozen)."""
    shapes = []
    for rule in rules:
        if rule.path.startswith("layers.") and rule.path.endswith(".kernel"):
            layers, d_in, d_out = frozen[rule.path].shape
            names = tuple(name.removesuffix(".weight") for name in rule.names(layers))
            shapes.append(LinearShape(rule.path.removesuffix(".kernel"), names, d_in, d_out))
    return tuple(shapes)


def stored_names(names: Iterable[str], rules: Iterable[WeightRule]) -> dict[str, str]:
    """The name that the table uses → the name in the files, for every tensor of a checkpoint.

    A checkpoint of the bare model lacks the prefix (``model.``, ``transformer.``, ``bert.``), old
    conversions call a norm's weight gamma and its bias beta, and a model with images keeps its
    language model under ``language_model.`` with prefixes of its own. Of a table that the head
    shares, safetensors' ``save_model`` keeps one name, which may be the head's.

    Example:
        >>> rule = WeightRule("embed_tokens.embedding", "transformer.wte.weight", False)
        >>> stored_names(["wte.weight"], [rule])
        {'transformer.wte.weight': 'wte.weight'}
    """
    names, rules = list(names), list(rules)
    prefix = rules[0].name.partition(".")[0] + "." if rules else ""
    inside = any(rule.name.startswith("model.language_model.") for rule in rules)
    bare = not inside and not any(name.startswith(prefix) for name in names)

    def usual(name: str) -> str:
        if inside and name.startswith("language_model."):
            name = name.removeprefix("language_model.")
            return name.replace("model.", "model.language_model.", 1)
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        return prefix + name if bare and not name.startswith("lm_head.") else name

    found = {usual(name): name for name in names}
    table = {rule.path: rule.name for rule in rules}
    shared = EMBEDDING in table and HEAD not in table and table[EMBEDDING] not in found
    if shared and HEAD_NAME in found:
        found[table[EMBEDDING]] = found.pop(HEAD_NAME)
    return found
