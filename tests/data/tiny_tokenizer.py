"""Byte-level tokenizers made offline: every text survives a round trip, so masks can be read."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, TURN, END = "<s>", "</s>", "<|turn|>", "<|end|>"

CHAT = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
CHAT_WITHOUT_EOS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}" + (
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Writes the earlier answers otherwise than it wrote them as the last turn.
CHAT_FORGETFUL = (
    "{% for m in messages %}[{{ m.role }}]"
    "{{ m.content if loop.last or m.role != 'assistant' else 'gone' }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT_REFUSING = "{{ raise_exception('roles must alternate') }}"

_TEXTS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes",
    "### Instruction: how many apples are there? ### Response: The answer is: 42",
]


def make(*, bos=True, adds_eos=False, eos=EOS, chat=None):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=[BOS, EOS, TURN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_TEXTS, trainer)
    if bos or adds_eos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{BOS if bos else ''} $A {EOS if adds_eos else ''}".strip(),
            special_tokens=[(BOS, 0), (EOS, 1)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=eos,
        chat_template=chat,
        clean_up_tokenization_spaces=False,
    )
