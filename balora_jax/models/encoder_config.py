"""Shape and options of an encoder, as its ``config.json`` fixes them."""

from dataclasses import dataclass

from balora_jax.models.disentangled import DisentangledConfig
from balora_jax.models.rotary import RopeConfig


@dataclass(frozen=True)
class ModernConfig:
    """What ModernBERT has beside BERT.

    Attributes:
        rope: positions of the layers that see everything.
        local_rope: those of the layers with a window.
        window: tokens that a layer with a window sees on either side.
        sliding_layers: which layers have it.
        pools_mean: the head reads the mean over the tokens, else the first one.
        attention_bias: biases of the layers of attention.
        mlp_bias: biases of the layers of the MLP.
        cutoff: standard deviations at which the numbers of a new head are cut.
    """

    rope: RopeConfig
    local_rope: RopeConfig
    window: int
    sliding_layers: tuple[bool, ...]
    pools_mean: bool
    attention_bias: bool
    mlp_bias: bool
    cutoff: float


@dataclass(frozen=True)
class EncoderConfig:
    """Shape and options of an encoder; all but ``num_labels`` come from ``config.json``.

    Attributes:
        model_type: family name in Hugging Face configs; DeBERTaV3's is ``deberta-v2``.
        vocab_size: V.
        hidden_size: D.
        intermediate_size: F.
        num_layers: L.
        num_heads: H.
        norm_eps: epsilon of the LayerNorms.
        activation: of the MLP.
        max_positions: rows of the table of absolute positions.
        position_offset: row of the first token; where positive, padding tokens are not counted.
        type_vocab_size: token types (sentence A, sentence B); 0 for none.
        pad_token_id: the token that RoBERTa's positions leave out.
        num_labels: C; 1 for regression.
        max_length: tokens of a sequence that the checkpoint can take.
        pooler_activation: between the two layers of the head.
        initializer_range: standard deviation of a new head.
        disentangled: DeBERTa's relative positions, or None.
        modern: ModernBERT's layers, or None.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    norm_eps: float
    activation: str
    max_positions: int
    position_offset: int
    type_vocab_size: int
    pad_token_id: int
    num_labels: int
    max_length: int
    pooler_activation: str = "tanh"
    initializer_range: float = 0.02
    disentangled: DisentangledConfig | None = None
    modern: ModernConfig | None = None

    @property
    def token_table(self) -> str:
        """Path of the embeddings of the tokens."""
        name = "word_embeddings" if self.modern is None else "tok_embeddings"
        return f"embeddings.{name}.embedding"

    @property
    def absolute_positions(self) -> bool:
        """Whether the embeddings hold a table of absolute positions."""
        if self.modern is not None:
            return False
        return self.disentangled is None or self.disentangled.position_biased_input
