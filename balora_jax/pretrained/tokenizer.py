"""The tokenizer of a checkpoint, opened once and tried, or refused in one sentence."""

from pathlib import Path
from typing import Any

from balora_jax.errors import InputError
from balora_jax.untyped.native import any_error_refused, held_stderr
from balora_jax.untyped.shown import shown

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt"),
    *("spiece.model", "spm.model", "sentencepiece.bpe.model"),
)
_REMEDY = "Save the tokenizer beside the weights."
_LARGEST_ID = 2**31 - 1


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer of ``transformers`` that lies in a folder, never with remote code.

    It is given two short texts: some faults of a file show only there.

    Raises:
        InputError: no file of a tokenizer, files that cannot be read, a tokenizer that fails on a
            plain text, or token ids that are no row of any table.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        # transformers would make up a BERT tokenizer that knows no word at all.
        raise InputError(
            f"{folder}: expected a tokenizer (tokenizer.json), got: no file of one. {_REMEDY}"
        )
    with (
        any_error_refused(f"{folder}: expected a tokenizer (tokenizer.json)", _REMEDY),
        held_stderr(),
    ):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        for texts in (["a b"], ["a b", "1."]):
            tokenizer.decode(tokenizer(*texts)["input_ids"])
        ids = tokenizer.get_vocab().values()
    wrong = [one for one in ids if not 0 <= one <= _LARGEST_ID]
    if wrong:
        raise InputError(
            f"{folder}: expected token ids from 0 to {_LARGEST_ID}, got {shown(wrong[0])} in the "
            f"tokenizer. {_REMEDY}"
        )
    return tokenizer
