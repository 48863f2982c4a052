"""Fields that all responses share: ids, usage, timings, log-probabilities."""

import time
import uuid
from collections.abc import Sequence

from lowlat.generate import completion
from lowlat.serve.protocol.chat_response import ChatLogprob, ChoiceLogprobs, TopLogprob
from lowlat.serve.protocol.usage import PromptDetails, Timings, Usage
from lowlat.serve.routes.context import RequestContext
from lowlat.text.tokenizer import Tokenizer


def new_id(prefix: str) -> str:
    """A unique id with `prefix`."""
    return f"{prefix}{uuid.uuid4().hex}"


def now() -> int:
    """Unix time in seconds."""
    return int(time.time())


def usage_of(ctx: RequestContext) -> Usage:
    """Token counts of all prompts and completions of `ctx` so far."""
    return Usage(
        prompt_tokens=ctx.prompt_tokens,
        completion_tokens=ctx.num_tokens,
        total_tokens=ctx.prompt_tokens + ctx.num_tokens,
        prompt_tokens_details=PromptDetails(cached_tokens=ctx.cached_tokens),
    )


def timings_of(ctx: RequestContext) -> Timings:
    """Times of `ctx` so far."""
    return Timings(
        prefill_seconds=round(ctx.prefill_seconds, 6),
        decode_seconds=round(ctx.decode_seconds, 6),
        tokens_per_second=round(ctx.tokens_per_second, 3),
    )


def chat_logprobs(
    tokenizer: Tokenizer, entries: Sequence[completion.TokenLogprob]
) -> ChoiceLogprobs:
    """Log-probabilities in the format of chat completions."""
    return ChoiceLogprobs(content=[_chat_logprob(tokenizer, entry) for entry in entries])


def _chat_logprob(tokenizer: Tokenizer, entry: completion.TokenLogprob) -> ChatLogprob:
    data = tokenizer.id_to_bytes(entry.token)
    return ChatLogprob(
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
