"""The smallest loss with every part in it: a random two-group decoder, adapters, packed rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from balora_jax.config import TrainingConfig
from balora_jax.models.adapters import adapter_shapes, plan_adapters
from balora_jax.models.decoder_config import DecoderConfig
from balora_jax.models.families.base import weight_rules
from balora_jax.models.rotary import RopeConfig
from balora_jax.models.starts import STARTS
from balora_jax.models.starts.stacks import start_adapters
from balora_jax.models.structure import structure
from balora_jax.models.weight_names import linear_shapes
from balora_jax.numerics import linalg
from balora_jax.numerics.objective import objective_of, weights
from balora_jax.tasks.text import loss as text_loss
from balora_jax.training import guard, optim, steps

LAYERS, VOCABULARY, CHUNK = 3, 23, 7
MODEL = DecoderConfig(
    model_type="llama",
    vocab_size=VOCABULARY,
    hidden_size=8,
    intermediate_size=12,
    num_layers=LAYERS,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    norm_eps=1e-3,
    activation="silu",
    rope=RopeConfig(theta=100.0),
    sliding_window=None,
    tie_word_embeddings=False,
    max_length=32,
)
# Segments of the four rows (0 is padding) and, below each, the tokens to be predicted.
SEGMENTS = ["1111222222", "1111111000", "1111111111", "1122333000"]
MARKED = ["0011000111", "0000111000", "0000000001", "0101011000"]


def batch(micro_batches=1, seed=0):
    """Arrays [micro-batches, B, T] of the four rows with random tokens."""
    digits = np.array([[int(c) for c in row] for row in SEGMENTS], np.int32)
    positions = np.zeros_like(digits)
    for row, position in zip(digits, positions, strict=True):
        for segment in set(row):
            position[row == segment] = np.arange((row == segment).sum())
    ids = np.random.default_rng(seed).integers(3, VOCABULARY, digits.shape).astype(np.int32)
    arrays = {
        "input_ids": np.where(digits > 0, ids, 0),
        "positions": positions,
        "segment_ids": digits,
        "loss_mask": np.array([[int(c) for c in row] for row in MARKED], np.int32),
    }
    return {k: v.reshape(micro_batches, -1, v.shape[-1]) for k, v in arrays.items()}


def _modules():
    linears = linear_shapes(weight_rules(MODEL), structure(MODEL).frozen)
    targets = ["q_proj", "v_proj", "down_proj"]
    return plan_adapters(linears, rank=2, alpha=3.0, target_modules=targets)


@functools.cache
def _arrays(start):
    """Adapters at their start and some way off it, and the frozen arrays: made once per start."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape)
        return jnp.asarray(1 + 0.1 * noise if "scale" in path else 0.5 * noise, jnp.float32)

    frozen = {path: draw(path, leaf) for path, leaf in structure(MODEL).frozen.items()}
    begin, origin = start_adapters(_modules(), frozen, start=STARTS[start], key=jax.random.key(0))
    adapters = {
        path: value + jnp.asarray(0.3 * rng.standard_normal(value.shape), jnp.float32)
        for path, value in begin.items()
    }
    factor = jnp.asarray(linalg.head_factor(np.asarray(frozen["lm_head.embedding"])))
    return begin, adapters, text_loss.Constants(frozen, origin, factor)


class Tiny:
    """Everything a step needs, for one objective."""

    def __init__(
        self,
        *,
        start="pissa",
        dropout=0.0,
        training=None,
        total_steps=10,
        head="fused",
        **objective,
    ):
        self.objective = objective_of(objective)
        self.plain = structure(MODEL)
        shapes = adapter_shapes(_modules(), origin=start != "lora", dropout=dropout)
        self.student = structure(MODEL, adapters=shapes)
        self.start, self.adapters, self.constants = _arrays(start)
        plan = text_loss.HeadPlan(head, CHUNK)
        loss = text_loss.TextLoss(self.student, self.plain, self.objective, plan)
        self.training = TrainingConfig(
            **{"max_steps": total_steps, "batch_size": 4, "optimizer": "sgd", "learning_rate": 0.1,
               "warmup": 0.0, **(training or {})}
        )  # fmt: skip
        self.parts = steps.StepParts(
            loss=loss,
            counts=lambda rows: text_loss.counts_of(rows, self.objective.mask_alignment),
            weights=lambda step: weights(self.objective, step, total_steps),
            optimizer=optim.make_optimizer(self.training, total_steps),
            learning_rate=optim.learning_rate_schedule(self.training, total_steps),
            dropout=dropout > 0,
        )

    def state(self, adapters=None):
        """Step 0 from the given adapters (a copy: a step donates its state)."""
        adapters = {k: jnp.array(v) for k, v in (adapters or self.adapters).items()}
        return steps.TrainState(
            jnp.zeros((), jnp.int32),
            adapters,
            self.parts.optimizer.init(adapters),
            guard.new_guard(),
        )
