"""What all replies need: ids, usage, timings, and tokens as text.

Owns the steps from the engine's figures to the wire; the formats are in `serve.protocol`.
"""

import time
import uuid
from collections.abc import Sequence

from lowlat.generate import completion
from lowlat.serve.protocol.chat_response import AnswerLogprob, ChoiceLogprobs, TopLogprob
from lowlat.serve.protocol.usage import PromptDetails, Timings, Usage
from lowlat.serve.routes.context import Call
from lowlat.text.tokenizer import Tokenizer


def new_id(prefix: str) -> str:
    """`prefix` and a part that no other id has."""
    return f"{prefix}{uuid.uuid4().hex}"


def now() -> int:
    """Unix time in seconds."""
    return int(time.time())


def usage_of(call: Call) -> Usage:
    """Tokens of all prompts and completions of `call`, so far."""
    return Usage(
        prompt_tokens=call.prompt_tokens,
        completion_tokens=call.num_tokens,
        total_tokens=call.prompt_tokens + call.num_tokens,
        prompt_tokens_details=PromptDetails(cached_tokens=call.cached_tokens),
    )


def timings_of(call: Call) -> Timings:
    """Times of `call`, so far."""
    return Timings(
        prefill_seconds=round(call.prefill_seconds, 6),
        decode_seconds=round(call.decode_seconds, 6),
        tokens_per_second=round(call.tokens_per_second, 3),
    )


def chat_logprobs(
    tokenizer: Tokenizer, entries: Sequence[completion.TokenLogprob]
) -> ChoiceLogprobs:
    """Log-probabilities in the form of chats."""
    return ChoiceLogprobs(content=[_chat_logprob(tokenizer, entry) for entry in entries])


def _chat_logprob(tokenizer: Tokenizer, entry: completion.TokenLogprob) -> AnswerLogprob:
    data = tokenizer.id_to_bytes(entry.token)
    return AnswerLogprob(
        token=_text(data),
        logprob=entry.logprob,
        bytes=list(data),
        top_logprobs=[_top_logprob(tokenizer, token, value) for token, value in entry.top],
    )


def _top_logprob(tokenizer: Tokenizer, token: int, logprob: float) -> TopLogprob:
    data = tokenizer.id_to_bytes(token)
    return TopLogprob(token=_text(data), logprob=logprob, bytes=list(data))


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")
