"""The tokenizer of a checkpoint, opened once and tried, or refused in one sentence."""

import importlib
from pathlib import Path
from typing import Any

from balora_jax.errors import InputError
from balora_jax.torch_import import torch_left_out
from balora_jax.untyped.native import any_error_refused, held_stderr
from balora_jax.untyped.shown import shown

_WHOLE = "tokenizer.json"
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "spm.model", "sentencepiece.bpe.model")
TOKENIZER_FILES = (_WHOLE, "tekken.json", "vocab.json", "vocab.txt", *_SENTENCEPIECE)
_REMEDY = "Save the tokenizer beside the weights."
_LARGEST_ID = 2**31 - 1


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer of ``transformers`` that lies in a folder, never with remote code.

    It is given two short texts: some faults of a file show only there.

    Raises:
        InputError: no file of a tokenizer, files that cannot be read, packages that these need and
            that are not there, a tokenizer that fails on a plain text, or token ids that are no row
            of any table.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        # transformers would make up a BERT tokenizer that knows no word at all.
        raise InputError(
            f"{folder}: expected a tokenizer (tokenizer.json), got: no file of one. {_REMEDY}"
        )
    _check_packages(folder)
    with (
        any_error_refused(f"{folder}: expected a tokenizer (tokenizer.json)", _REMEDY),
        held_stderr(),
        torch_left_out(),
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


def _check_packages(folder: Path) -> None:
    """Raises InputError where a model of sentencepiece cannot be read for want of a package.

    ``transformers`` would ask for another package, or for a file that the folder need not have.
    """
    found = [name for name in _SENTENCEPIECE if (folder / name).is_file()]
    if found and not (folder / _WHOLE).is_file():
        with any_error_refused(
            f"{folder}: expected sentencepiece and a protobuf that fits it, to read {found[0]}",
            "Install both: pip install 'sentencepiece<0.2.3' protobuf.",
        ):
            importlib.import_module("sentencepiece.sentencepiece_model_pb2")
