"""One token of a row of logits: temperature, filters, draw.

Owns what the filters keep. Every filter keeps the first tokens of one ranking, the largest logit
first and equal ones by id, so their order matters for probabilities alone: top-p counts those that
top-k left, min-p compares with the largest.
"""

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from lowlat.ops import native, native_kernels


def draw(
    logits: Float[Tensor, " vocab"],
    number: float,
    *,
    temperature: int | float,
    top_k: int = 0,
    top_p: int | float = 1.0,
    min_p: int | float = 0.0,
) -> int:
    """The first id up to which the kept weights sum to more than `number` of all of them;
    0 <= number < 1. Options are those of `kept_weights`.
    """
    if logits.dtype == torch.float32 and logits.device.type == "cpu" and native.available():
        return native_kernels.draw(
            logits, number, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
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
    """e^((logit - largest) / temperature) of every token, 0 for those the filters drop.

    top_k: the k largest logits are kept, 0 keeps all. top_p: of those the fewest, largest first,
    whose weights sum to top_p of theirs, 1 keeps all. min_p: of those the ones that weigh at least
    min_p. Raises ValueError where the largest logit is not finite.
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
