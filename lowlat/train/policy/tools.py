"""Tool messages in rollouts of several turns: their tokens by the model's chat template."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lowlat.text.chat_prompt import encode_chat
from lowlat.text.tokenizer import Tokenizer
from lowlat.train.policy.prompts import PromptRecord
from lowlat.train.rewards.workers import ToolWorkers
from lowlat.utils.errors import UserError

PROBE = "probe 7f3a"


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutTool:
    """The tool of a GRPO phase."""

    workers: ToolWorkers
    tokenizer: Tokenizer
    max_iterations: int
    """Most tool messages in a completion."""


def tool_message_ids(tokenizer: Tokenizer, prompt: PromptRecord, text: str) -> list[int]:
    """What follows the end token of an answer to `prompt`: a tool message with `text`, and the
    beginning of the next answer.

    The answer itself keeps the tokens that were sampled. Raises UserError if the template fails or
    does not end answers with an end token.
    """
    answered = _answered_ids(tokenizer, prompt)
    ids = encode_chat(tokenizer, [*_answered(prompt), {"role": "tool", "content": text}])
    end = len(answered)
    if end <= len(prompt.ids) or ids[:end] != answered:
        raise UserError(
            "the chat template does not write tool messages after an answer and its end token"
        )
    return ids[end:]


def _answered(prompt: PromptRecord) -> list[dict[str, Any]]:
    """The chat of `prompt` with an answer."""
    assert not isinstance(prompt.prompt, str)
    return [*prompt.prompt, {"role": "assistant", "content": "x"}]


@lru_cache(maxsize=256)
def _answered_ids(tokenizer: Tokenizer, prompt: PromptRecord) -> list[int]:
    """Tokens of the chat of `prompt` with an answer, up to the answer's end token; empty without
    one. All completions of a prompt need them after each tool call."""
    ids = encode_chat(tokenizer, _answered(prompt), add_generation_prompt=False)
    ends = [place for place, id in enumerate(ids) if id in tokenizer.eos_ids]
    return ids[: ends[-1] + 1] if ends else []


def check_tool_messages(tokenizer: Tokenizer, prompts: Sequence[PromptRecord]) -> None:
    """Raises UserError, starting with the key, unless tool messages can follow answers to
    `prompts`.
    """
    if isinstance(prompts[0].prompt, str):
        raise UserError("tool: texts have no turns; write prompts as chats")
    try:
        ids = tool_message_ids(tokenizer, prompts[0], PROBE)
    except UserError as error:
        raise UserError(f"tool: {error}; remove it or use another base_model") from error
    if PROBE not in tokenizer.decode(ids):
        raise UserError(
            "tool: the chat template leaves out tool messages; remove it or use another base_model"
        )
