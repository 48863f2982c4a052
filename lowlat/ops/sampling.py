"""Sampling a token from logits: temperature, top-k, top-p (nucleus) and min-p filters.

Every filter keeps a prefix of the ranking by logit, ties by id, so the order of filters affects
probabilities only: top-p sums over the tokens that top-k kept, min-p compares with the largest.
"""

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from lowlat.ops import native


def draw(
    logits: Float[Tensor, " vocab"],
    number: float,
    *,
    temperature: int | float,
    top_k: int = 0,
    top_p: int | float = 1.0,
    min_p: int | float = 0.0,
) -> int:
    """Inverse transform sampling: the first id at which the cumulative kept weights exceed `number`
    times their sum; 0 <= number < 1. Options are those of `kept_weights`. The native kernel gives
    the same token.
    """
    if logits.dtype == torch.float32 and logits.device.type == "cpu" and native.available():
        return native.module().draw(
            logits.detach().contiguous(),
            number,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
        )
    weights = kept_weights(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    cumulative = weights.cumsum(0)
    # number < 1, so the product stays below the last entry and the index within bounds.
    threshold = number * float(cumulative[-1])
    return int(torch.searchsorted(cumulative, threshold, right=True))


def kept_weights(
    logits: Float[Tensor, " vocab"],
    *,
    temperature: int | float,
    top_k: int = 0,
    top_p: int | float = 1.0,
    min_p: int | float = 0.0,
) -> Float64[Tensor, " vocab"]:
    """e^((logit - largest) / temperature) of every token, 0 for filtered ones.

    top_k: keep the k largest logits, 0 keeps all. top_p: of those keep the fewest, largest first,
    whose weights sum to top_p of the total, 1 keeps all. min_p: keep those with a weight of at
    least min_p. Raises ValueError if the largest logit is not finite.
    """
    scores = logits.double()
    largest = float(scores.max())
    if not math.isfinite(largest):
        raise ValueError("the largest logit is not finite")
    weights = ((scores - largest) / temperature).exp()
    if top_k > 0 or top_p < 1.0:
        ranking = logits.sort(descending=True, stable=True).indices
        if top_k > 0:
            weights[ranking[top_k:]] = 0.0
        if top_p < 1.0:
            reached = weights[ranking].cumsum(0)
            is_enough = reached >= top_p * reached[-1]
            weights[ranking[1:][is_enough[:-1]]] = 0.0
    weights[weights < min_p] = 0.0
    return weights
