"""Prompts of `lowlat generate`, and its completions as text or JSON."""

import json
from dataclasses import asdict
from typing import Any

from lowlat.cli.chat_terminal import printable
from lowlat.generate.completion import Completion
from lowlat.generate.model import Model
from lowlat.utils.errors import UserError


def as_prompt(
    model: Model, text: str, *, raw: bool, system: str | None
) -> str | list[dict[str, str]]:
    """The text itself, or messages if the model has a chat template and `raw` is false."""
    has_template = model.tokenizer.chat_template is not None
    if system is not None and not has_template:
        raise UserError(f"{model.name} has no chat template; leave --system out")
    if raw or not has_template:
        return text
    return chat_messages(system, text)


def chat_messages(system: str | None, text: str) -> list[dict[str, str]]:
    """One user message after an optional system message."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": text}]


def print_json(model: Model, completions: list[Completion]) -> None:
    """One object: the model and its completions with tokens, log-probabilities and timing."""
    print(
        json.dumps(
            {"model": model.name, "completions": [completion_dict(each) for each in completions]},
            ensure_ascii=False,
        )
    )


def completion_dict(completion: Completion) -> dict[str, Any]:
    """Text, tokens, finish reason, requested log-probabilities, timing and throughput."""
    usage, logprobs = completion.usage, completion.logprobs
    return {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "logprobs": None if logprobs is None else [asdict(entry) for entry in logprobs],
        "usage": {
            **asdict(usage),
            "prefill_tokens_per_second": usage.prefill_tokens_per_second,
            "decode_tokens_per_second": usage.decode_tokens_per_second,
        },
    }


def print_numbered(completions: list[Completion]) -> None:
    for number, completion in enumerate(completions, 1):
        print(f"--- {number}\n{printable(completion.text)}")
