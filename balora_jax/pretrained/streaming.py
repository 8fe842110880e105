"""The text of an answer while its tokens are written."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from balora_jax.pretrained.load import continuations

_HALF = "\ufffd"
"""What a tokenizer writes for the bytes of a character that is not whole yet."""


def pieces(tokenizer: Any, prompt: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """Pieces of the text after a prompt, each as soon as no later token changes it.

    Joined they are the text that :func:`~balora_jax.pretrained.load.continuations` gives: a
    character of several tokens comes when it is whole, and of a tokenizer that takes out blanks
    before marks a word comes when the next one begins.

    Args:
        tokenizer: of ``transformers``.
        prompt: token ids before the answer.
        tokens: of the answer, as they come.
    """
    by_words = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
    # Where a prompt ends within a character, the next tokens change what came before.
    split = tokenizer.decode(list(prompt), skip_special_tokens=True).endswith(_HALF)
    found: list[int] = []
    said = text = ""
    for token in tokens:
        found.append(token)
        [text] = continuations(tokenizer, [prompt], [found])
        ready = "" if split else _settled(text, by_words=by_words)
        if len(ready) > len(said):
            yield ready[len(said) :]
            said = ready
    if len(text) > len(said):
        yield text[len(said) :]


def _settled(text: str, *, by_words: bool) -> str:
    """The beginning of a text that stays as it is.

    >>> _settled("so it\ufffd\ufffd", by_words=False), _settled("so it ca", by_words=True)
    ('so it', 'so it')
    """
    whole = text.rstrip(_HALF)
    return whole.rpartition(" ")[0] if by_words else whole
