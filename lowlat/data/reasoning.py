"""Chat templates whose generation prompt opens reasoning, as DeepSeek-R1's with <think>, and the
two parts of such an answer.

These templates omit the reasoning of answers in a rendered chat, so `chat` assembles the training
target from the parts.
"""

import re
from collections.abc import Mapping
from typing import Any

from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError

OPEN, CLOSE = "<think>", "</think>"
_OPENED = re.compile(rf"{OPEN}\s*\Z".encode())
_PROBE = "\ue000"
"""A private-use character, which no template contains."""


def is_opened(prompt: bytes) -> bool:
    """Whether `prompt` ends with an opened <think>."""
    return _OPENED.search(prompt) is not None


def opens_reasoning(tokenizer: Tokenizer) -> bool:
    """Whether the generation prompt of `tokenizer`'s chat template, if any, opens reasoning."""
    if tokenizer.chat_template is None:
        return False
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": _PROBE}])
    except UserError:  # encoding a chat raises it again
        return False
    return is_opened(text.encode())


def end_of_answer(tokenizer: Tokenizer) -> list[int]:
    """Ids that the template puts after an answer. Raises UserError if it rejects a plain chat."""
    messages = [{"role": role, "content": _PROBE} for role in ("user", "assistant")]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    return tokenizer.encode(text.rpartition(_PROBE)[2], add_special_tokens=False)


def parts(message: Mapping[str, Any]) -> tuple[str, str] | None:
    """(reasoning, answer) of a message, with the blanks around </think>.

    Reasoning is reasoning_content, or the content before </think>. None without reasoning, and for
    tool calls, which these templates render without reasoning.
    """
    content, thought = message.get("content"), message.get("reasoning_content")
    if not isinstance(content, str) or message.get("tool_calls"):
        return None
    if isinstance(thought, str) and thought:
        return f"{thought}\n", f"\n\n{content}"
    thought, closed, answer = content.partition(CLOSE)
    if not closed:
        return None
    return thought.removeprefix(OPEN).removeprefix("\n"), answer
