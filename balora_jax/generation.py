"""Batched generation with a cache of keys and values: greedy or sampled, ended by stop tokens.

For a model with three methods (:class:`Cached`; the decoders of this package have them):
``empty_cache(batch, length)``, ``extend(ids, positions, valid, cache)`` and ``logits(hidden)``.

:func:`make_decoder` compiles a loop for one :class:`Sampling`; :func:`generate` pads prompts to
few widths, runs it batch by batch and cuts each row at its stop token. Rows draw with keys of their
own, so a text does not depend on what else is in its batch. :func:`decode` is the loop itself, to
be jitted by the caller; :func:`next_token` chooses from logits. :class:`Streamer` gives the tokens
of one prompt as they are written.

``load_pretrained(...).generate(prompts)`` does all of it, with the checkpoint's tokenizer.

>>> import jax, jax.numpy as jnp
>>> class Next:  # a "model" that counts upwards from the last token
...     def empty_cache(self, batch, length):
...         return ()
...     def extend(self, input_ids, positions, valid, cache):
...         return jax.nn.one_hot(input_ids + 1, 16), cache
...     def logits(self, hidden):
...         return hidden
>>> sampling = Sampling(max_new_tokens=8, stop_ids=(5,), pad_id=0)
>>> decoder = make_decoder(Next, sampling)
>>> generate(decoder, (), [[1], [1, 3]], sampling, batch_size=2, key=jax.random.key(0))
[[2, 3, 4], [4]]
"""

from balora_jax.models.generation import (
    Cached,
    Sampling,
    Streamer,
    decode,
    generate,
    make_decoder,
    next_token,
)

__all__ = ["Cached", "Sampling", "Streamer", "decode", "generate", "make_decoder", "next_token"]
