"""Request validation against the model's limits: context, vocabulary, completions per request.

Whether a valid request runs in the next step is the scheduler's decision.
"""

from collections.abc import Sequence

from lowlat.engine.params import TokenSamplingParams
from lowlat.utils.errors import UserError


def check_request(
    prompt: Sequence[int],
    params: TokenSamplingParams,
    *,
    context: int,
    vocab_size: int,
    max_sequences: int,
) -> int:
    """Output tokens that fit the context after `prompt`, at least 1. Raises UserError naming the
    exceeded limit and by how much it is exceeded."""
    if len(prompt) == 0:
        raise UserError("the prompt is empty; give at least one token")
    max_output = context - len(prompt)
    if max_output < 1:
        raise UserError(
            f"the prompt has {len(prompt)} tokens and the context is {context}, of which one must "
            "be left for the answer; shorten the prompt"
        )
    # After the length check, so that a prompt of millions of ids costs nothing here.
    if not 0 <= min(prompt) <= max(prompt) < vocab_size:
        raise UserError(f"the prompt has a token id outside the vocabulary of {vocab_size}")
    if params.max_tokens is not None and params.max_tokens > max_output:
        raise UserError(
            f"max_tokens {params.max_tokens} and a prompt of {len(prompt)} tokens exceed the "
            f"context of {context}; set max_tokens to at most {max_output} or leave it out"
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
    return max_output
