"""Chat templates of twelve families, written for these tests after their public documentation.

Each is a Jinja text, the tokens that are special in it, and the token that ends a text. They do what
the originals do to roles, blanks, thoughts, tools, the date and the end of a conversation.
"""

from typing import NamedTuple


class Family(NamedTuple):
    """One template; ``roles`` are those besides user and assistant."""

    template: str
    eos: str
    special: tuple[str, ...]
    system: bool = True
    tools: bool = False


_LLAMA3_TURN = (
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim"
    " + '<|eot_id|>' }}"
)
_LLAMA3_END = (
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
_LLAMA3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def _llama31(date):
    return (
        "{{ '<|begin_of_text|>' }}{%- if messages[0]['role'] == 'system' %}"
        "{%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}"
        "{%- else %}{%- set system = '' %}{%- endif %}"
        "{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: ' }}" + date + "{{ '\n\n' }}"
        "{%- if tools %}{{ 'You have access to these functions:\n\n' }}"
        "{%- for t in tools %}{{ t | tojson(indent=4) + '\n\n' }}{%- endfor %}{%- endif %}"
        "{{ system + '<|eot_id|>' }}"
        "{%- for m in messages %}{%- if m.role == 'tool' or m.role == 'ipython' %}"
        "{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}"
        "{%- elif 'tool_calls' in m %}{%- set call = m.tool_calls[0].function %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
        "{{ '{\"name\": \"' + call.name + '\", \"parameters\": ' + call.arguments | tojson + '}' }}"
        "{{ '<|eot_id|>' }}{%- else %}" + _LLAMA3_TURN + "{%- endif %}{%- endfor %}" + _LLAMA3_END
    )


_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>'"
    " + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_IM = ("<|im_start|>", "<|im_end|>")
_QWEN_HEAD = (
    "{%- if tools %}{{ '<|im_start|>system\n' }}"
    "{%- if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}DEFAULT{%- endif %}"
    "{{ '# Tools\n\n<tools>' }}{%- for t in tools %}{{ '\n' + t | tojson }}{%- endfor %}"
    "{{ '\n</tools><|im_end|>\n' }}{%- elif messages[0].role == 'system' %}"
    "{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}ELSE{%- endif %}"
)
_QWEN_TOOLS = (
    "{%- if m.tool_calls %}{%- for c in m.tool_calls %}{%- if not loop.first or m.content %}"
    "{{ '\n' }}{%- endif %}{{ '<tool_call>\n{\"name\": \"' + c.function.name + '\", \"arguments\": '"
    " + c.function.arguments | tojson + '}\n</tool_call>' }}{%- endfor %}{%- endif %}"
    "{{ '<|im_end|>\n' }}"
)
_QWEN_REPLY = (
    "{%- elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content"
    " + '\n</tool_response><|im_end|>\n' }}"
)
_QWEN25 = (
    _QWEN_HEAD.replace(
        "DEFAULT", "{%- else %}{{ 'You are Qwen, a helpful assistant.\n\n' }}"
    ).replace(
        "ELSE",
        "{%- else %}{{ '<|im_start|>system\nYou are Qwen, a helpful assistant.<|im_end|>\n' }}",
    )
    + "{%- for m in messages %}{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{%- elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' + m.content }}"
    + _QWEN_TOOLS + _QWEN_REPLY + "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)  # fmt: skip
# Thoughts of turns before the last question go; the last answer gets a block of them, empty or not.
_QWEN3 = (
    _QWEN_HEAD.replace("DEFAULT", "").replace("ELSE", "")
    + "{%- set ns = namespace(last=0) %}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{%- elif m.role == 'assistant' %}"
    "{%- set said = m.content %}{%- set thought = '' %}"
    "{%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}"
    "{%- elif '</think>' in m.content %}"
    "{%- set thought = m.content.split('</think>')[0].split('<think>')[-1] %}"
    "{%- set said = m.content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n'"
    " + said.lstrip('\n') }}"
    "{%- else %}{{ '<|im_start|>assistant\n' + said }}{%- endif %}"
    + _QWEN_TOOLS + _QWEN_REPLY + "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)  # fmt: skip
_QWEN3_2507 = _QWEN25.replace(
    "{%- else %}{{ 'You are Qwen, a helpful assistant.\n\n' }}", ""
).replace(
    "{%- else %}{{ '<|im_start|>system\nYou are Qwen, a helpful assistant.<|im_end|>\n' }}", ""
)


def _gemma(first):
    return (
        "{{ '<bos>' }}" + first + "{%- for m in messages %}"
        "{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant') }}{%- endif %}"
        "{%- set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + (start if loop.first else '') + m['content'] | trim"
        " + '<end_of_turn>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{%- endif %}"
    )


_GEMMA_TOKENS = ("<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>")
# The system's text goes to the last question, wherever that is.
_MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}"
    "{%- endif %}{%- set ns = namespace(last=0) %}{%- for m in loop_messages %}"
    "{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{{ '<s>' }}{%- for m in loop_messages %}{%- if m.role == 'user' %}"
    "{%- if tools and loop.index0 == ns.last %}{{ '[AVAILABLE_TOOLS] ' + tools | tojson"
    " + '[/AVAILABLE_TOOLS]' }}{%- endif %}"
    "{%- if system is defined and loop.index0 == ns.last %}"
    "{{ '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}"
    "{%- else %}{{ '[INST] ' + m.content + '[/INST]' }}{%- endif %}"
    "{%- elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}{%- for c in m.tool_calls %}"
    "{{ c.function | tojson }}{{ ', ' if not loop.last else '' }}{%- endfor %}{{ ']</s>' }}"
    "{%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}"
    "{%- elif m.role == 'assistant' %}{{ ' ' + m.content | trim + '</s>' }}{%- endif %}{%- endfor %}"
)
_PHI_TURNS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}"
    "{{ '<|endoftext|>' }}{% endif %}"
)
_PHI3 = (
    "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '<|user|>\n' + m['content'] + '<|end|>\n<|assistant|>\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if not add_generation_prompt %}{{ '<|endoftext|>' }}{% endif %}"
)
_PHI_TOKENS = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>", "<s>")

FAMILIES = {
    "llama 3": Family(
        "{% for m in messages %}{% if loop.first %}{{ '<|begin_of_text|>' }}{% endif %}"
        + _LLAMA3_TURN + "{% endfor %}" + _LLAMA3_END,
        "<|eot_id|>", _LLAMA3_TOKENS,
    ),
    "llama 3.1": Family(
        _llama31("{{ '26 Jul 2024' }}"), "<|eot_id|>", _LLAMA3_TOKENS, tools=True
    ),
    "llama 3.2": Family(
        _llama31(
            "{%- if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}"
            "{%- else %}{{ '26 Jul 2024' }}{%- endif %}"
        ),
        "<|eot_id|>", _LLAMA3_TOKENS, tools=True,
    ),
    "qwen 2.5": Family(_QWEN25, "<|im_end|>", _IM, tools=True),
    "qwen 3": Family(_QWEN3, "<|im_end|>", _IM, tools=True),
    "qwen 3 2507": Family(_QWEN3_2507, "<|im_end|>", _IM, tools=True),
    "gemma 1": Family(
        _gemma("{%- set start = '' %}"), "<eos>", _GEMMA_TOKENS, system=False
    ),
    "gemma 3": Family(
        _gemma(
            "{%- if messages[0]['role'] == 'system' %}"
            "{%- set start = messages[0]['content'] + '\n\n' %}{%- set messages = messages[1:] %}"
            "{%- else %}{%- set start = '' %}{%- endif %}"
        ),
        "<eos>", _GEMMA_TOKENS,
    ),
    "mistral v0.3": Family(_MISTRAL, "</s>", ("<s>", "</s>"), tools=True),
    "phi 3": Family(_PHI3, "<|endoftext|>", _PHI_TOKENS, system=False),
    "phi 3.5": Family(_PHI_TURNS, "<|endoftext|>", _PHI_TOKENS),
    "chatml": Family(_CHATML, "<|im_end|>", _IM),
}  # fmt: skip
