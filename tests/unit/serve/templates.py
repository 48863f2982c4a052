"""Chat templates modelled on well-known families, and tokenizers with their special tokens.

They are short, and use the same markers and conditions as those models' own templates.
"""

from functools import cache

from tokenizers import AddedToken

from lowlat.serve.tool_parsers.formats import (
    DeepSeekV3ToolParser,
    DeepSeekV31ToolParser,
    GigaChat3ToolParser,
    GigaChat31ToolParser,
    HermesToolParser,
    KimiK2ToolParser,
    Llama3ToolParser,
    MistralListToolParser,
    MistralToolParser,
)
from lowlat.serve.tool_parsers.python_calls import MiniCPM3ToolParser
from lowlat.serve.tool_parsers.xml import GlmToolParser, Qwen3CoderToolParser
from lowlat.text.tokenizer import Tokenizer
from tests.fakes import byte_backend, wrapped

DEEPSEEK = (
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>",  # noqa: RUF001
    "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",  # noqa: RUF001
)  # fmt: skip
KIMI = (
    "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>",
    "<|tool_call_end|>", "<|tool_call_argument_begin|>",
)  # fmt: skip

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HERMES = (
    "{% if tools %}<|im_start|>system\nFunctions:{% for t in tools %}\n{{ t | tojson }}"
    '{% endfor %}\nAnswer with <tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call>'
    "<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": '
    "{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}"
    "{{ c.function.arguments | tojson }}{% endif %}}"
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>"
    "{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n"
    "{% if tools and loop.last %}Reply with "
    '{"name": function name, "parameters": dictionary of arguments}.'
    "{% for t in tools %}{{ t | tojson(indent=4) }}\n\n{% endfor %}{% endif %}"
    "{% if m.tool_calls is defined %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('one call at a time') }}{% endif %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": '
    "{{ m.tool_calls[0].function.arguments | tojson }}}"
    "{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{% if tools and loop.last %}[AVAILABLE_TOOLS] {{ tools | tojson }}"
    "[/AVAILABLE_TOOLS]{% endif %}[INST] {{ m.content }}[/INST]"
    "{% elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('ids must have length 9') }}{% endif %}"
    '{{ c.function | tojson }}, "id": "{{ c.id }}"{% if not loop.last %}, {% endif %}{% endfor %}]'
    "{{ eos_token }}{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    '{% elif m.role == "tool" %}[TOOL_RESULTS] {"content": {{ m.content | tojson }}, "call_id": '
    '"{{ m.tool_call_id }}"}[/TOOL_RESULTS]'
    "{% else %}{{ raise_exception('only user, assistant and tool') }}{% endif %}{% endfor %}"
)
MISTRAL_NAMES = (
    "{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}"
    "[/SYSTEM_PROMPT]{% else %}{% if tools and loop.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}"
    "[/AVAILABLE_TOOLS]{% endif %}[INST]{{ m.content }}[/INST]{% endif %}"
    "{% for c in m.tool_calls or [] %}[TOOL_CALLS]{{ c.function.name }}[ARGS]"
    "{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
)
R1 = (
    "{{ bos_token }}{% for t in tools or [] %}{{ t.function.name }}: "
    "{{ t.function.parameters | tojson }}\n{% endfor %}"
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}<｜User｜>{{ m.content }}"  # noqa: RUF001
    "{% elif m.role == 'tool' %}<｜tool▁outputs▁begin｜>{{ m.content }}"  # noqa: RUF001
    "{% elif m.content is none %}<｜Assistant｜><｜tool▁calls▁begin｜>"  # noqa: RUF001
    "{% for c in m.tool_calls %}{{ '<｜tool▁call▁begin｜>' + c.type + '<｜tool▁sep｜>'"  # noqa: RUF001
    " + c.function.name + '\n```json\n' + c.function.arguments + '\n```<｜tool▁call▁end｜>' }}"  # noqa: RUF001
    "{% endfor %}<｜tool▁calls▁end｜>{% else %}<｜Assistant｜>"  # noqa: RUF001
    "{{ m.content.split('</think>')[-1] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"  # noqa: RUF001
)
V31 = (
    R1.replace("'\n```json\n'", f"'{DEEPSEEK[4]}'")
    .replace("\n```<", "<")
    .replace("<think>\n", "{{ '<think>' if thinking else '</think>' }}")
)
KIMI_K2 = (
    "{% if tools %}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{% endif %}"
    "{% for m in messages %}<|im_{{ m.role }}|>{{ m.content }}"
    "{% if m.tool_calls %}<|tool_calls_section_begin|>{% for c in m.tool_calls %}"
    "<|tool_call_begin|>{{ c.id }}<|tool_call_argument_begin|>{{ c.function.arguments | tojson }}"
    "<|tool_call_end|>{% endfor %}<|tool_calls_section_end|>{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"
)
GLM = (
    "[gMASK]<sop>{% if tools %}<|system|>\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "<tool_call>{name}\n<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n</tool_call>"
    "{% endif %}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}\n<tool_call>{{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() %}\n<arg_key>{{ k }}</arg_key>\n<arg_value>"
    "{{ v if v is string else v | tojson }}</arg_value>{% endfor %}\n</tool_call>{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{{ '\n<think></think>' if enable_thinking is defined and not enable_thinking }}{% endif %}"
)
QWEN_CODER = (
    "{% for t in tools or [] %}<function>{{ t.function.name }}</function>{% endfor %}"
    "Write <tool_call>\n<function=name>\n<parameter=key>\nvalue\n</parameter>\n</function>\n"
    "</tool_call>" + CHATML
)
GIGACHAT = (
    "{{ bos_token }}{% for t in tools or [] %}developer<|role_sep|>\n{{ t | tojson }}"
    "<|message_sep|>\n\n{% endfor %}{% for m in messages %}{{ m.role }}<|role_sep|>\n"
    "{{ m.content }}<|message_sep|>\n\n{% for c in m.tool_calls or [] %}"
    "function call<|role_sep|>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "<|message_sep|>\n\n{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant<|role_sep|>\n{% endif %}"
)
GIGACHAT_31 = GIGACHAT.replace("function call<|role_sep|>\n", "<|function_call|>")
MINICPM3 = (
    "{% for t in tools or [] %}def {{ t.function.name }}(): ...\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.tool_calls %}<|tool_call_start|>\n```python\n{% for c in m.tool_calls %}"
    "{{ c.function.name }}({% for k, v in c.function.arguments.items() %}{{ k }}={{ v | tojson }}"
    "{{ ', ' if not loop.last }}{% endfor %})\n{% endfor %}```\n<|tool_call_end|>{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNKNOWN = CHATML + "{{ tools | tojson }}<function_calls><invoke>"

TEMPLATES = {
    "hermes": HERMES, "llama": LLAMA, "mistral": MISTRAL, "mistral names": MISTRAL_NAMES, "r1": R1,
    "v3.1": V31, "kimi": KIMI_K2, "glm": GLM, "qwen coder": QWEN_CODER,
    "minicpm3": MINICPM3, "gigachat 3": GIGACHAT,
    "gigachat 3.1": GIGACHAT_31, "unknown": UNKNOWN, "chatml": CHATML,
}  # fmt: skip
SPECIAL = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<|python_tag|>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]",
    *DEEPSEEK, *KIMI, "<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>",
    "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "[gMASK]", "<sop>",
    "<|role_sep|>", "<|message_sep|>", "<|function_call|>", "<|tool_call_start|>",
    "<|tool_call_end|>",
)  # fmt: skip
PLAIN = (
    "<tool_call>", "</tool_call>", "<think>", "</think>", "<arg_key>", "</arg_key>", "<arg_value>",
    "</arg_value>",
)  # fmt: skip


@cache
def tokenizer_of(family: str) -> Tokenizer:
    """Bytes, and all families' control tokens; the template is that of `family`."""
    return tokenizer_with(TEMPLATES[family])


def tokenizer_with(template: str | None) -> Tokenizer:
    """The same with another template."""
    backend = byte_backend(SPECIAL)
    backend.add_tokens([AddedToken(text, normalized=False) for text in PLAIN])
    return wrapped(backend, chat_template=template)


FORMATS = (
    HermesToolParser(),
    Llama3ToolParser(),
    MistralListToolParser(),
    MistralToolParser(),
    DeepSeekV3ToolParser(),
    DeepSeekV31ToolParser(),
    KimiK2ToolParser(),
    GlmToolParser(),
    Qwen3CoderToolParser(),
    GigaChat3ToolParser(),
    GigaChat31ToolParser(),
    MiniCPM3ToolParser(),
)
IDS = [type(tools).__name__ for tools in FORMATS]
"""Names of FORMATS, as test ids."""
