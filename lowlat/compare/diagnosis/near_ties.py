"""Near ties of sparse attention (DSA): choices of tokens that differ because rounding decides
between nearly equal index scores.

A difference of two choices is one of near ties if both implementations score alike, within the
tolerance of the comparison, and each chooses the best tokens of its own scores.
"""

from jaxtyping import Float
from torch import Tensor

from lowlat.compare.diagnosis.index_audit import index_inputs, index_variants
from lowlat.compare.diagnosis.index_reference import follows, index_scores
from lowlat.compare.diagnosis.mistakes import limit_of, relative_difference
from lowlat.compare.trace import Block, Trace, Window, block_of, layer_number
from lowlat.config.attention import sparse_topk
from lowlat.config.model import ModelConfig


def follows_scores(trace: Trace, config: ModelConfig, window: Window) -> bool:
    """Whether every choice of `trace` is that of the best tokens of its own scores."""
    return all(
        (scores := own_scores(trace, config, block, window)) is not None
        and _follows(trace, config, block, scores)
        for block in trace.chosen_tokens()
    )


def near_ties(a: Trace, b: Trace, config: ModelConfig, window: Window, tolerance: float) -> bool:
    """Whether the choices of `a` and `b` differ at near ties only. config: that of both."""
    own, other = a.chosen_tokens(), b.chosen_tokens()
    for block in own.keys() & other.keys():
        if own[block].equal(other[block]):
            continue
        scores = [own_scores(trace, config, block, window) for trace in (a, b)]
        x, y = scores
        if x is None or y is None or relative_difference(y.tril(), x.tril()) > tolerance:
            return False
        if not (_follows(a, config, block, x) and _follows(b, config, block, y)):
            return False
    return True


def own_scores(
    trace: Trace, config: ModelConfig, block: Block, window: Window
) -> Float[Tensor, "tokens tokens"] | None:
    """Index scores of the layer that chooses for `block`: the recorded ones, else computed from its
    recorded inputs; None if neither is in the trace.
    """
    source = config.choosing_layer(layer_number(config, block))
    if source is None:
        return None
    chosen_by = block_of(config, source)
    recorded = trace.get(chosen_by, "index_scores")
    given = index_inputs(trace, config, chosen_by, window)
    if recorded is not None or given is None:
        return recorded
    _, correct = next(index_variants(config, source))
    return index_scores(given, correct)


def _follows(trace: Trace, config: ModelConfig, block: Block, scores: Tensor) -> bool:
    topk = sparse_topk(config.attention_of(layer_number(config, block)))
    assert topk is not None
    limit = limit_of(trace.cached or trace.dtype)
    return follows(trace.chosen_tokens()[block], scores, topk, limit)
