"""BA-LoRA on a Hugging Face model, without ``fit``."""

import jax
import optax

from balora_jax import load_pretrained, regularizers

base = load_pretrained("balora_jax:quickstart/model")
model = base.with_adapters(rank=8, start="pissa", key=jax.random.key(0))
*frozen, trainable = model.parts
texts = ["Ann has 3 pears.", "Tom buys 5 more apples than Ann."]
ids = base.tokenizer(texts, padding=True, return_tensors="np")["input_ids"]
optimizer = optax.adamw(1e-3)


def loss(trainable, frozen, ids):
    labels, modules = ids[:, 1:].ravel(), (model.bind(*frozen, trainable), base.bind(frozen[0]))
    student, teacher = (module(ids)[:, :-1].reshape(len(labels), -1) for module in modules)
    task = optax.softmax_cross_entropy_with_integer_labels(student, labels).mean()
    return task + 0.1 * regularizers.consistency_nlg(student, teacher, labels >= 0, temperature=2.0)


@jax.jit
def step(trainable, state, frozen, ids):
    value, gradient = jax.value_and_grad(loss)(trainable, frozen, ids)
    updates, state = optimizer.update(gradient, state, trainable)
    return optax.apply_updates(trainable, updates), state, value


state = optimizer.init(trainable)
for i in range(20):
    trainable, state, value = step(trainable, state, frozen, ids)
    print(f"step {i}: loss {value:.3f}")
