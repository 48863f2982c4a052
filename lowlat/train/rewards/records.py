"""Prompts of records, in lowlat's and in GSM8K's format, and the fields that rewards need."""

from collections.abc import Mapping, Sequence
from typing import Any

from lowlat.train.rewards.functions import FIELDS
from lowlat.utils.errors import UserError

Prompt = str | list[dict[str, Any]]


def prompt_of(record: Mapping[str, Any], where: str) -> Prompt:
    """The record's `prompt`, a text or chat messages; in GSM8K's format its `question` as a chat.

    Raises UserError starting with `where` (file and line) if it has none.
    """
    prompt = record.get("prompt")
    if prompt is None and isinstance(record.get("question"), str) and "answer" in record:
        return [{"role": "user", "content": record["question"]}]
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, list) and prompt and all(map(_is_message, prompt)):
        return prompt
    raise UserError(f"{where}: 'prompt' must be a text, or chat messages with role and content")


def check_fields(record: Mapping[str, Any], where: str, reward_funcs: Sequence[str]) -> None:
    """Raises UserError starting with `where` if a reward needs a field that `record` lacks."""
    for name in reward_funcs:
        fields = FIELDS.get(name, ())
        if fields and all(record.get(field) is None for field in fields):
            needed = " or ".join(repr(field) for field in fields)
            raise UserError(
                f"{where}: has no {needed}, which {name} needs; add it, or remove the reward"
            )


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str)
