"""Files that lie beside a model's weights: those of its tokenizer, a card, the settings."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

CARD = "README.md"
SETTINGS = "balora_config.yaml"
CHAT_TEMPLATE = "chat_template.jinja"

# Copied as they are where present; code and pickles never are.
_TOKENIZER = (
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|tekken)\.json",
    r"(vocab|merges)\.txt",
    r"tokenizer\.model(\.v\d+(m\d+)?)?",
    r"(spiece|spm|sentencepiece|sentencepiece\.bpe)\.model",
    r"chat_template\.(jinja|json)",
    r"(additional_)?chat_templates/[^/]+\.jinja",
)
_MODEL = (
    r"(generation|processor|preprocessor)_config\.json",
    r"(LICENSE|NOTICE|USE_POLICY)(\.(txt|md))?",
)
_TEMPLATES = ("additional_chat_templates", "chat_templates")


def _any_of(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{one})" for one in patterns))


OF_A_TOKENIZER = _any_of(*_TOKENIZER)
"""Names of a tokenizer's files, with its chat templates."""

OF_A_MODEL = _any_of(*_MODEL, *_TOKENIZER)
"""Names of what a merged checkpoint takes over from its base."""

OURS = _any_of(re.escape(CARD), re.escape(SETTINGS))
"""Names of what is written beside the weights."""

OF_AN_ADAPTER = _any_of(OURS.pattern, *_TOKENIZER)
"""Names of what an adapter's folder may hold besides the adapter."""

Beside = Mapping[str, Path | bytes]
"""From names to files that are copied, or to contents."""


def entries(folder: Path) -> dict[str, Path]:
    """What lies in a folder by name; of its folders of chat templates, what lies in them."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name in _TEMPLATES and path.is_dir():
            found |= {f"{path.name}/{inner.name}": inner for inner in sorted(path.iterdir())}
        else:
            found[path.name] = path
    return found


def found_beside(folder: Path, names: re.Pattern[str]) -> dict[str, Path | bytes]:
    """Those files of a folder whose names match."""
    return {
        name: path
        for name, path in entries(folder).items()
        if names.fullmatch(name) and path.is_file()
    }


def put_beside(folder: Path, files: Beside) -> None:
    """Write files into a folder by name."""
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            shutil.copyfile(content, folder / name)
