"""Prompts of rollouts from a JSON Lines file: texts or chats, with the records that rewards get."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowlat.generate.prompt import encode_prompt
from lowlat.text.tokenizer import Tokenizer
from lowlat.train.rewards.records import Prompt, check_fields, prompt_of
from lowlat.utils.errors import UserError
from lowlat.utils.strict_json import parse_object

TOO_LONG = (
    "sequence_length holds prompt and grpo.max_completion_length: raise it, or shorten the prompt"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRecord:
    """One line of the file."""

    prompt: Prompt = field(hash=False)
    """Text to continue, or chat messages."""
    record: dict[str, Any] = field(hash=False)
    """The whole object."""
    ids: tuple[int, ...]
    """The prompt's tokens; those of a chat by the model's template."""


def read_prompts(
    path: Path,
    tokenizer: Tokenizer,
    *,
    longest: int,
    reward_funcs: Sequence[str],
    key: str = "grpo.prompts",
    too_long: str = TOO_LONG,
) -> list[PromptRecord]:
    """The prompts in `path`, of up to `longest` tokens, with the fields that the rewards need.

    key, too_long: in errors, what names the file, and the remedy for a longer prompt. Raises
    UserError naming the line.
    """
    prompts = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}: line {number}"
                    prompts.append(_prompt(line, where, tokenizer, reward_funcs))
                    _check_length(prompts[-1], where, longest, too_long)
                    if isinstance(prompts[-1].prompt, str) != isinstance(prompts[0].prompt, str):
                        raise UserError(f"{where}: mixes texts and chats; write one kind of prompt")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); name a JSON Lines file as {key}"
        ) from error
    if not prompts:
        raise UserError(f"{path}: has no prompt; write one JSON object with 'prompt' per line")
    return prompts


def file_fingerprint(path: Path, what: str) -> str:
    """SHA-256 of the file `path`. Raises UserError, which asks for `what`, if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name {what}") from error


def _prompt(
    line: bytes, where: str, tokenizer: Tokenizer, reward_funcs: Sequence[str]
) -> PromptRecord:
    record = parse_object(line, where)
    prompt = prompt_of(record, where)
    check_fields(record, where, reward_funcs)
    try:
        ids = encode_prompt(tokenizer, prompt)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return PromptRecord(prompt=prompt, record=record, ids=tuple(ids))


def _check_length(prompt: PromptRecord, where: str, longest: int, too_long: str) -> None:
    size = len(prompt.ids)
    if not 0 < size <= longest:
        text = f"{size} tokens, and {longest} fit" if size else "no token"
        raise UserError(f"{where}: the prompt has {text}; {too_long}")
