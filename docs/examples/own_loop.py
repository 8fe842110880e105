"""BA-LoRA in a training loop of your own: any NNX model, any optax optimizer, three terms."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from balora_jax import adapters, regularizers

VOCABULARY, WIDTH = 64, 32


class Model(nnx.Module):
    """Stands for a pretrained model of yours: the next token from the last one."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        return self.head(x + self.down(nnx.gelu(self.up(x))))


model = adapters.adapt(
    Model(nnx.Rngs(0)), rank=8, target_modules=["up", "down"], start="pissa", key=jax.random.key(1)
)
graph, start, frozen = nnx.split(model, nnx.LoRAParam, ...)
optimizer = optax.adam(3e-3)


def loss(trainable, tokens):
    """Cross-entropy of the next token and the three terms; token 0 is padding."""
    inputs, labels = tokens[:, :-1], tokens[:, 1:].ravel()
    counted = labels != 0
    student = nnx.merge(graph, trainable, frozen)(inputs).reshape(-1, VOCABULARY)
    teacher = nnx.merge(graph, start, frozen)(inputs).reshape(-1, VOCABULARY)  # as it was
    task = optax.softmax_cross_entropy_with_integer_labels(student, labels).mean(where=counted)
    consistency = regularizers.consistency_nlg(student, teacher, counted, temperature=2.0)
    diversity = regularizers.diversity_nlg(student, counted, top_k=16)
    spectral = regularizers.spectral_nlg(student, counted, k=4, norm="frobenius")
    return task + 0.05 * consistency + 0.05 * diversity + 0.01 * spectral


@jax.jit
def step(trainable, state, tokens):
    value, gradient = jax.value_and_grad(loss)(trainable, tokens)
    updates, state = optimizer.update(gradient, state, trainable)
    return optax.apply_updates(trainable, updates), state, value


trainable, state = start, optimizer.init(start)
for i in range(100):  # rows that count upwards from anywhere
    first = jax.random.randint(jax.random.key(i), (16, 1), 1, VOCABULARY)
    tokens = (first + jnp.arange(12)[None, :]) % VOCABULARY
    trainable, state, value = step(trainable, state, tokens)
    if i % 33 == 0:
        print(f"step {i:3}: loss {value:.3f}")
