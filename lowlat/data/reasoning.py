"""Chat templates that ask for an answer with reasoning already open, as DeepSeek-R1's does with
<think>, and the two parts of an answer to that.

Such templates leave reasoning out of the answers that stand in a chat, so no rendering holds all
that a model is to say; `chat` puts it together.
"""

import re
from collections.abc import Mapping
from typing import Any

from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError

OPEN, CLOSE = "<think>", "</think>"
_OPENED = re.compile(rf"{OPEN}\s*\Z".encode())
_PROBE = "\ue000"
"""A character that no template writes."""


def is_opened(prompt: bytes) -> bool:
    """Whether what asks for an answer, at the end of `prompt`, begins its reasoning."""
    return _OPENED.search(prompt) is not None


def opens_reasoning(tokenizer: Tokenizer) -> bool:
    """Whether the template of `tokenizer`, if any, asks for answers so."""
    if tokenizer.chat_template is None:
        return False
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": _PROBE}])
    except UserError:  # says so of every chat
        return False
    return is_opened(text.encode())


def end_of_answer(tokenizer: Tokenizer) -> list[int]:
    """What the template writes after an answer. Raises UserError where it refuses a plain chat."""
    messages = [{"role": role, "content": _PROBE} for role in ("user", "assistant")]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    return tokenizer.encode(text.rpartition(_PROBE)[2], add_special_tokens=False)


def parts(message: Mapping[str, Any]) -> tuple[str, str] | None:
    """(reasoning, answer) of a message, with the blanks around what closes the reasoning; None
    where it has none, or calls tools, which such templates render without. Reasoning may be
    reasoning_content, or stand before </think> in the content.
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
