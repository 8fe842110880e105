"""The protocol of a family of models: one object that reads its config and names its weights.

A family's file makes one and registers it; its name is the ``model_type`` of its ``config.json``.
A user's own file may register more.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

from flax import nnx

from balora_jax.errors import InputError
from balora_jax.models.decoder import Decoder, DecoderLayer
from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.encoder import Encoder
from balora_jax.models.encoder_config import EncoderConfig
from balora_jax.models.families import bert_names, llama_names
from balora_jax.models.options import Options
from balora_jax.models.weight_names import WeightRule
from balora_jax.registry import Registry
from balora_jax.untyped.fields import Fields

Kind = Literal["decoder", "encoder"]
Config = DecoderConfig | EncoderConfig
Rules = tuple[WeightRule, ...]


class GgufLayout(NamedTuple):
    """A family in the files of llama.cpp.

    Attributes:
        arch: its name there, as the package ``gguf`` has it.
        meta_rows: whether the rows of q and k lie there in Meta's order, those that rotate together
            side by side, and not half a head apart as in a checkpoint.
    """

    arch: str
    meta_rows: bool = False


@runtime_checkable
class Family(Protocol):
    """Questions of the package to a family; the two classes below answer them."""

    kind: ClassVar[Kind]
    task_type: ClassVar[str]
    """In PEFT's words."""

    @property
    def name(self) -> str:
        """``model_type`` in Hugging Face configs."""
        ...

    @property
    def gguf(self) -> GgufLayout | None:
        """Its layout in llama.cpp; None where no adapter of it is served there."""
        ...

    @property
    def other_linears(self) -> tuple[str, ...]:
        """Names of linear layers that the checkpoint has and the model has not."""
        ...

    @property
    def read(self) -> Callable[[Fields], Any]:
        """From a parsed ``config.json`` to the config of a model."""
        ...

    @property
    def rules(self) -> Callable[[Any], Rules]:
        """From that config to the weight-name table of what stays frozen."""
        ...

    def head_rules(self) -> Rules:
        """The weight-name table of the trainable head; empty where there is none."""
        ...

    def head_settings(self, config: Any) -> dict[str, Any]:
        """What a ``config.json`` says of the head; empty where there is none."""
        ...

    def head_modules(self) -> tuple[str, ...]:
        """What PEFT calls the modules of the head."""
        ...

    def ignored(self, config: Any) -> tuple[str, ...]:
        """Patterns of checkpoint names that may be left over."""
        ...

    def build(self, config: Any, options: Options) -> nnx.Module:
        """The model."""
        ...


@dataclass(frozen=True)
class DecoderFamily:
    """A family of causal language models.

    Attributes:
        name: ``model_type`` in Hugging Face configs.
        read: its config, from a parsed ``config.json``.
        rules: the weight-name table; by default that of Llama's names.
        layer: the stack of its layers.
        leftovers: patterns of names that carry no weight, or none of the language model.
        other_linears: names that end as those of linear layers beside the language model's do.
        gguf: its layout in llama.cpp, where that has the family.
    """

    name: str
    read: Callable[[Fields], DecoderConfig]
    rules: Callable[[DecoderConfig], Rules] = llama_names.weight_rules
    layer: Callable[[DecoderConfig, Options], Any] = DecoderLayer
    leftovers: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)
    other_linears: tuple[str, ...] = ()
    gguf: GgufLayout | None = None
    kind: ClassVar[Kind] = "decoder"
    task_type: ClassVar[str] = "CAUSAL_LM"

    def head_rules(self) -> Rules:
        """None: the head stays frozen."""
        return ()

    def head_settings(self, config: DecoderConfig) -> dict[str, Any]:
        """None, for the same reason."""
        del config
        return {}

    def head_modules(self) -> tuple[str, ...]:
        """None, for the same reason."""
        return ()

    def build(self, config: DecoderConfig, options: Options) -> nnx.Module:
        """The model."""
        return Decoder(config, options, self.layer)

    def ignored(self, config: DecoderConfig) -> tuple[str, ...]:
        """Patterns of checkpoint names that may be left over; a tied head may be stored too."""
        return self.leftovers + ((r"lm_head\.weight",) if config.tie_word_embeddings else ())


@dataclass(frozen=True)
class EncoderFamily:
    """A family of bidirectional encoders with a head for classes or a score.

    Names are those of ``transformers``' class for sequence classification; a checkpoint without a
    head (a pretrained base) has all but those of the head.

    Attributes:
        name: ``model_type`` in Hugging Face configs.
        read: its config, from a parsed ``config.json``.
        prefix: of its weights' names.
        names: the weight-name table of the encoder by config and prefix; by default BERT's.
        head_table: that of the head, where it is more than two layers with biases.
        module: the model; by default BERT's.
        head: checkpoint names of the head's two layers.
        architecture: the class of ``transformers`` with such a head.
        leftovers: patterns of other heads' names, and of buffers in old checkpoints.
        other_linears, gguf: as of a decoder.
    """

    name: str
    read: Callable[[Fields], EncoderConfig]
    prefix: str
    head: tuple[str, str]
    architecture: str
    leftovers: tuple[str, ...] = ()
    other_linears: tuple[str, ...] = ()
    names: Callable[[EncoderConfig, str], Rules] = bert_names.weight_rules
    head_table: Rules = ()
    module: Callable[[EncoderConfig, Options], nnx.Module] = Encoder
    gguf: GgufLayout | None = None
    kind: ClassVar[Kind] = "encoder"
    task_type: ClassVar[str] = "SEQ_CLS"

    def build(self, config: EncoderConfig, options: Options) -> nnx.Module:
        """The model."""
        return self.module(config, options)

    def rules(self, config: EncoderConfig) -> Rules:
        """The weight-name table of the encoder, which stays frozen."""
        return self.names(config, self.prefix)

    def head_rules(self) -> Rules:
        """The weight-name table of the head: pooler and classifier, both trainable."""
        dense, out = self.head
        return self.head_table or (
            *bert_names.linear_rules("head.dense", dense),
            *bert_names.linear_rules("head.out", out),
        )

    def head_settings(self, config: EncoderConfig) -> dict[str, Any]:
        """What a ``config.json`` says of the head: its class and its labels."""
        labels = {str(i): f"LABEL_{i}" for i in range(config.num_labels)}
        return {
            "architectures": [self.architecture],
            "id2label": labels,
            "label2id": {name: int(i) for i, name in labels.items()},
            "num_labels": len(labels),
            # Named in either case: the base may have been fine-tuned for the other.
            "problem_type": "regression" if len(labels) == 1 else "single_label_classification",
        }

    def head_modules(self) -> tuple[str, ...]:
        """What PEFT calls the modules of the head, ``pooler`` and ``classifier`` say."""
        names = (rule.name.removeprefix(f"{self.prefix}.") for rule in self.head_rules())
        return tuple(sorted({name.partition(".")[0] for name in names}))

    def ignored(self, config: EncoderConfig) -> tuple[str, ...]:
        """Patterns of checkpoint names that may be left over."""
        if config.absolute_positions:
            return self.leftovers
        return (*self.leftovers, rf"{self.prefix}\.embeddings\.position_embeddings\..*")


FAMILIES: Registry[Family] = Registry("family", "config.json: model_type")


def family_of(config: Config) -> Family:
    """The family that read a config."""
    return FAMILIES[config.model_type]


def weight_rules(config: Config) -> Rules:
    """The weight-name table of what stays frozen of a model."""
    return family_of(config).rules(config)


def read_config(
    values: Mapping[str, Any],
    where: str,
    *,
    kind: Kind | None = None,
    num_labels: int | None = None,
) -> Any:
    """The model that a Hugging Face ``config.json`` describes.

    Args:
        values: the parsed file.
        where: its path, for messages.
        kind: ``decoder`` or ``encoder`` where only one will do.
        num_labels: classes of an encoder's head, 1 for a regression; the file's own where not
            given.

    Returns:
        A ``DecoderConfig`` or an ``EncoderConfig``.

    Raises:
        InputError: an unsupported ``model_type``, a missing key, a value of the wrong type or out
            of bounds, or an option that this code lacks.
    """
    name = values.get("model_type")
    named = {family.name: family for family in FAMILIES.values() if kind in (None, family.kind)}
    if isinstance(name, str) and name in named:
        config = named[name].read(Fields(values, where))
        return config if num_labels is None else replace(config, num_labels=num_labels)
    raise InputError(
        f"{where}: expected model_type to be one of {', '.join(named)}, got {name!r}. "
        f"Use a checkpoint of one of these families{_other_task(kind)}."
    )


def _other_task(kind: Kind | None) -> str:
    """Where the other kind of model is welcome."""
    if kind is None:
        return ""
    others = [family for family in FAMILIES.values() if family.kind != kind]
    names = ", ".join(family.name for family in others)
    other, task = ("an encoder", "labels") if kind == "decoder" else ("a decoder", "text")
    return f", or {other} ({names}) with task: {task}"
