"""Files that lie beside a model's weights: those of its tokenizer, a card, the settings."""

import shutil
from collections.abc import Mapping
from pathlib import Path

CARD = "README.md"
SETTINGS = "balora_config.yaml"
CHAT_TEMPLATE = "chat_template.jinja"

# Copied as they are where present; code and pickles never are.
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    CHAT_TEMPLATE,
    "chat_template.json",
)

OF_A_MODEL = ("generation_config.json", *_TOKENIZER)
"""Files that a merged checkpoint takes over from its base."""

OF_AN_ADAPTER = (CARD, SETTINGS, *_TOKENIZER)
"""Files that an adapter's folder may hold besides the adapter."""

Beside = Mapping[str, Path | bytes]
"""From names to files that are copied, or to contents."""


def found_beside(folder: Path, names: tuple[str, ...]) -> dict[str, Path | bytes]:
    """Those of the named files that a folder has."""
    return {name: folder / name for name in names if (folder / name).is_file()}


def tokenizer_of(folder: Path) -> dict[str, Path | bytes]:
    """The files of a checkpoint's tokenizer, with its chat template."""
    return found_beside(folder, _TOKENIZER)


def put_beside(folder: Path, files: Beside) -> None:
    """Write files into a folder by name."""
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            shutil.copyfile(content, folder / name)
