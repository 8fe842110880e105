"""What a model card says of its folder, by what the folder holds, and how that is used."""

import json
import re
from typing import NamedTuple


class Kind(NamedTuple):
    """A kind of folder.

    Attributes:
        title: of the card; ``{}`` is the base.
        holds: what is in the folder; ``{}`` is the base, with its revision.
        library: by which the hub opens it.
        tags: beside those of the method.
        again: how this folder comes from a run that was made again; None where the run leaves it.
        code: language and text of the example; it fills in what ``Loaded`` has.
    """

    title: str
    holds: str
    library: str
    tags: tuple[str, ...]
    again: str | None
    code: tuple[str, str]


class Loaded(NamedTuple):
    """What the example of a card loads.

    Attributes:
        model: the class of ``transformers``.
        base: the base, without folders of this machine.
        options: of the base on the hub, as text that follows its name.
        remark: behind the line that loads the base.
    """

    model: str
    base: str
    options: str
    remark: str

    def filled(self, text: str) -> str:
        """The example."""
        parts = {
            "MODEL": self.model,
            "BASE": json.dumps(self.base, ensure_ascii=False),
            "OPTIONS": self.options,
            "REMARK": self.remark,
        }
        return re.sub("|".join(parts), lambda found: parts[found[0]], text)


_WHOLE = (
    "python",
    "from transformers import MODEL, AutoTokenizer\n\n"
    'folder = "."  # this one, or its name on the hub\n'
    "model = MODEL.from_pretrained(folder)\n"
    "tokenizer = AutoTokenizer.from_pretrained(folder)",
)

ADAPTER = Kind(
    title="LoRA adapter for {}",
    holds="This folder holds a LoRA adapter for {}, in PEFT's format. It needs that base, "
    "unchanged; the weights of the base are not in it.",
    library="peft",
    tags=("lora",),
    again=None,
    code=(
        "python",
        "from peft import PeftModel\n"
        "from transformers import MODEL, AutoTokenizer\n\n"
        'adapter = "."  # this folder, or its name on the hub\n'
        "base = MODEL.from_pretrained(BASEOPTIONS)REMARK\n"
        "model = PeftModel.from_pretrained(base, adapter)\n"
        "tokenizer = AutoTokenizer.from_pretrained(adapter)",
    ),
)

GGUF = Kind(
    title="LoRA adapter for {}, in GGUF",
    holds="This folder holds a LoRA adapter for {}, in the format of llama.cpp. It needs that base "
    "as a GGUF file; the weights of the base are not in it.",
    library="gguf",
    tags=("lora",),
    again="balora export SETTINGS --workdir runs/again --format gguf --out gguf",
    code=("bash", "llama-server -m base.gguf --lora adapter.gguf"),
)

MERGED = Kind(
    title="{} with a LoRA adapter merged",
    holds="This folder holds {} with a trained LoRA adapter merged into its weights: a checkpoint "
    "of `transformers` that needs neither the base nor PEFT.",
    library="transformers",
    tags=("lora",),
    again="balora export SETTINGS --workdir runs/again --format merged --out merged",
    code=_WHOLE,
)

FULL = Kind(
    title="{}, fine-tuned",
    holds="This folder holds {}, fine-tuned in all its weights: a checkpoint of `transformers` "
    "that does not need the base.",
    library="transformers",
    tags=(),
    again=None,
    code=_WHOLE,
)
