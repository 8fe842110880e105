"""Operations of a step, counted by hand."""

from balora_jax.tasks import flops


def test_flops_of_an_encoder_by_hand():
    """Two rows of 8 tokens, 100 parameters, 3 layers of width 4; attention is the whole square."""
    tokens, attention = 16, 3 * 2 * 2 * 4 * 8 * 16
    taught = 6 * 100 * tokens + 4 * attention
    assert flops.encoder_flops(100, 3, 4, (1, 2, 8), taught=True) == taught
    assert flops.encoder_flops(100, 3, 4, (1, 2, 8), taught=False) == (
        4 * 100 * tokens + 3 * attention
    )
