"""Token usage and timings of a response."""

from lowlat.serve.protocol.base import WireModel


class PromptDetails(WireModel):
    cached_tokens: int
    """Prompt tokens found in the prefix cache."""


class Usage(WireModel):
    prompt_tokens: int
    completion_tokens: int
    """Of all completions, including end-of-sequence tokens and tokens of stop strings."""
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Timings(WireModel):
    """Timings, an extension of OpenAI's format."""

    prefill_seconds: float
    """Time from the prompt's first step to the first token."""
    decode_seconds: float
    """Time from the first token to the last."""
    tokens_per_second: float
    """Decode throughput of all completions together."""
