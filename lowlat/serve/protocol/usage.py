"""Tokens and times as responses tell them."""

from lowlat.serve.protocol.base import WireModel


class PromptDetails(WireModel):
    cached_tokens: int
    """Prompt tokens found in the prefix cache."""


class Usage(WireModel):
    prompt_tokens: int
    completion_tokens: int
    """Of all completions, tokens of stop strings and of the end of sequence included."""
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Timings(WireModel):
    """An extension of OpenAI's format: what the answer took."""

    prefill_seconds: float
    """From the prompt's first step to the first token."""
    decode_seconds: float
    """From the first token to the last."""
    tokens_per_second: float
    """While decoding, all completions together."""
