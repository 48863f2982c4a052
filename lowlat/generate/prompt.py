"""Prompts of the Python API: text, token ids or chat messages, to token ids."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from lowlat.engine.params import integer_of
from lowlat.text.chat_prompt import encode_chat
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text to continue, token ids, or chat messages ({"role": ..., "content": ...})."""


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Token ids of `prompt`. Raises UserError for anything but text, token ids and messages."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    if isinstance(prompt, Sequence):
        messages = [item for item in prompt if isinstance(item, Mapping)]
        if messages and len(messages) == len(prompt):
            return encode_chat(tokenizer, messages)
        if (ids := _plain_integers(prompt)) is not None:
            return ids
    raise UserError(
        "prompt must be text, a list of token ids, or a list of messages with role and content"
    )


def begins_text(tokenizer: Tokenizer, prompt: Prompt, ids: Sequence[int]) -> bool:
    """Whether the output after `prompt`, encoded as `ids`, is a text of its own: the answer to chat
    messages, or the continuation of a prompt without text."""
    is_chat = not isinstance(prompt, str) and any(isinstance(item, Mapping) for item in prompt)
    return is_chat or not tokenizer.has_text(ids)


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """`prompts`, or a list of one if they are a single prompt; a single message is a chat."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping):
        return [[prompts]]
    first = next(iter(prompts), None)
    is_one = isinstance(first, Mapping) or integer_of(first) is not None
    return cast("Sequence[Prompt]", [prompts] if is_one else prompts)


def _plain_integers(items: Sequence[Any]) -> list[int] | None:
    """`items` as plain integers; None if one is no integer."""
    found = [integer_of(item) for item in items]
    return None if None in found else cast("list[int]", found)
