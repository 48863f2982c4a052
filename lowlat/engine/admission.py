"""Whether a model can serve a request at all. Whether it can now is the scheduler's business."""

from collections.abc import Sequence

from lowlat.engine.params import SamplingParams
from lowlat.utils.errors import UserError


def check_request(
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    context: int,
    vocab_size: int,
    max_sequences: int,
) -> int:
    """Tokens the context leaves for output, at least 1. Raises UserError naming what is too much
    and by how much."""
    if len(prompt) == 0:
        raise UserError("the prompt is empty; give at least one token")
    room = context - len(prompt)
    if room < 1:
        raise UserError(
            f"the prompt has {len(prompt)} tokens and the context is {context}, of which one must "
            "be left for the answer; shorten the prompt"
        )
    # After the length, which is all that is asked of a prompt of millions of ids.
    if not 0 <= min(prompt) <= max(prompt) < vocab_size:
        raise UserError(f"the prompt has a token id outside the vocabulary of {vocab_size}")
    if params.max_tokens is not None and params.max_tokens > room:
        raise UserError(
            f"max_tokens {params.max_tokens} and a prompt of {len(prompt)} tokens exceed the "
            f"context of {context}; set max_tokens to at most {room} or leave it out"
        )
    if params.n > max_sequences:
        raise UserError(
            f"n {params.n} exceeds the {max_sequences} completions that may run at once; lower n"
        )
    if params.logit_bias and max(params.logit_bias) >= vocab_size:
        raise UserError(
            f"logit_bias names token {max(params.logit_bias)}, outside the vocabulary of "
            f"{vocab_size}"
        )
    return room
