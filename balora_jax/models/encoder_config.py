"""Shape and options of an encoder, as its ``config.json`` fixes them."""

from dataclasses import dataclass

from balora_jax.models.disentangled import DisentangledConfig


@dataclass(frozen=True)
class EncoderConfig:
    """Shape and options of an encoder; all but ``num_labels`` come from ``config.json``.

    Attributes:
        model_type: ``bert``, ``roberta`` or ``deberta-v2`` (which DeBERTaV3 uses as well).
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

    @property
    def absolute_positions(self) -> bool:
        """Whether the embeddings hold a table of absolute positions."""
        return self.disentangled is None or self.disentangled.position_biased_input
