"""Audit of the indexer of sparse attention (DSA): recomputes index scores and the choice of tokens,
as configured and with known mistakes.

Where an implementation shows no scores, the choice alone identifies every mistake that changes it.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from lowlat.compare.diagnosis.index_reference import (
    IndexInputs,
    IndexVariant,
    follows,
    follows_unmasked,
    index_scores,
)
from lowlat.compare.diagnosis.mistakes import (
    UNEXPLAINED,
    Mistake,
    StepAudit,
    limit_of,
    relative_difference,
)
from lowlat.compare.trace import Block, Trace, Window, block_of, layer_number
from lowlat.config.model import MLAConfig, ModelConfig

REPRODUCED = 0.9
"""Least share of queries whose choice a mistake must reproduce, as ties are ordered at will."""
PAIRS = {True: "(2i, 2i+1)", False: "(i, i + d/2)"}


def indexer(
    trace: Trace, config: ModelConfig, block: Block, window: Window
) -> dict[str, StepAudit | None]:
    """Audits of "index_scores" and "index_choice"; None for steps that are not in the trace."""
    layer = layer_number(config, block)
    attention, source = config.attention_of(layer), config.choosing_layer(layer)
    if source is None or not isinstance(attention, MLAConfig) or attention.indexer is None:
        return {}
    chosen_by = block_of(config, source)
    given = index_inputs(trace, config, chosen_by, window)
    if given is None:
        return {}
    variants = list(index_variants(config, source))
    return {
        "index_scores": None if source != layer else _scores(trace, block, given, variants),
        "index_choice": _choice(trace, config, block, chosen_by, given, variants),
    }


def index_inputs(
    trace: Trace, config: ModelConfig, block: Block, window: Window
) -> IndexInputs | None:
    """Recorded inputs of the indexer of `block`; None if they are not in the trace, or if it
    rotates at some of the model's frequencies only (index_rope_head_dim of model_type lowlat).
    """
    layer = layer_number(config, block)
    attention = config.attention_of(layer)
    assert isinstance(attention, MLAConfig) and attention.indexer is not None
    if attention.indexer.index_rope_head_dim not in (None, attention.qk_rope_head_dim):
        return None
    names = ("input_norm", "index_q", "index_k", "index_norm", "index_norm_bias")
    seen = [trace.get(block, name) for name in (*names, "index_head_weight")]
    if any(value is None for value in seen):
        return None
    x, q, k, norm, bias, head_weight = (value for value in seen if value is not None)
    late = block.number + 1 if block.stage == "mtp" else 0
    return IndexInputs(
        x=x,
        q=q.unflatten(-1, (attention.indexer.index_n_heads, -1)),
        k=k,
        norm=norm,
        norm_bias=bias,
        head_weight=head_weight,
        positions=window.positions[late : late + len(x)],
        rope=config.rope_of(layer),
        rope_dim=attention.qk_rope_head_dim,
    )


def index_variants(
    config: ModelConfig, layer: int
) -> Iterator[tuple[tuple[Mistake, ...], IndexVariant]]:
    """The correct scores, then mistakes."""
    attention = config.attention_of(layer)
    assert isinstance(attention, MLAConfig) and attention.indexer is not None
    pairs, width = attention.indexer.rope_interleave, attention.indexer.index_head_dim
    correct = IndexVariant(interleave=pairs, scale=width**-0.5)
    yield (), correct
    known = [
        (
            "index_rope_layout",
            f"rotates pairs {PAIRS[not pairs]} of the indexer, not {PAIRS[pairs]}",
            replace(correct, interleave=not pairs),
        ),
        (
            "index_rope_channels",
            "rotates the last channels of index queries and keys, not the first",
            replace(correct, last=True),
        ),
        (
            "index_scale",
            "scales index scores by qk_head_dim^-0.5, not by index_head_dim^-0.5",
            replace(correct, scale=attention.qk_head_dim**-0.5),
        ),
        ("index_relu", "sums index scores without ReLU", replace(correct, relu=False)),
        (
            "index_head_weights",
            "weights index heads without the factor index_n_heads^-0.5",
            replace(correct, head_scale=False),
        ),
        (
            "index_key_norm",
            "normalises index keys without the bias of k_norm",
            replace(correct, norm_bias=False),
        ),
    ]
    for kind, detail, variant in known:
        yield (Mistake(kind, detail),), variant


def _scores(
    trace: Trace,
    block: Block,
    given: IndexInputs,
    variants: list[tuple[tuple[Mistake, ...], IndexVariant]],
) -> StepAudit | None:
    recorded = trace.get(block, "index_scores")
    if recorded is None:
        return None
    limit = limit_of(trace.cached or trace.dtype)
    for mistakes, variant in variants:
        if relative_difference(recorded, index_scores(given, variant).tril()) <= limit:
            return StepAudit(mistakes=mistakes)
    return UNEXPLAINED


def _choice(
    trace: Trace,
    config: ModelConfig,
    block: Block,
    chosen_by: Block,
    given: IndexInputs,
    variants: list[tuple[tuple[Mistake, ...], IndexVariant]],
) -> StepAudit | None:
    recorded = trace.get(block, "index_choice")
    attention = config.attention_of(layer_number(config, block))
    if recorded is None or not isinstance(attention, MLAConfig) or attention.indexer is None:
        return None
    choice, topk = recorded > 0, attention.indexer.index_topk
    limit = limit_of(trace.cached or trace.dtype)
    for mistakes, variant in variants:
        if follows(choice, index_scores(given, variant), topk, limit):
            return StepAudit(mistakes=mistakes)
    if follows_unmasked(choice, index_scores(given, variants[0][1]), topk) >= REPRODUCED:
        return StepAudit(mistakes=(Mistake("index_causal", "chooses before the causal mask"),))
    if (other := _chosen_elsewhere(trace, config, block, chosen_by, choice)) is not None:
        detail = f"attends to the tokens that {other} chose, not to those of {chosen_by}"
        return StepAudit(mistakes=(Mistake("index_layer", detail),))
    # A choice that follows wrong scores is right; the audit of the scores reports them.
    scores = trace.get(chosen_by, "index_scores")
    explained = scores is not None and follows(choice, scores, topk, limit)
    return StepAudit() if explained else UNEXPLAINED


def _chosen_elsewhere(
    trace: Trace,
    config: ModelConfig,
    block: Block,
    chosen_by: Block,
    choice: Bool[Tensor, "tokens tokens"],
) -> Block | None:
    """A block with the choice of `block` that is not to share it: the last before it, else the
    first after it.
    """
    source = layer_number(config, chosen_by)
    others = [
        other
        for other in trace.blocks()
        if other != block and config.choosing_layer(layer_number(config, other)) != source
    ]
    order = trace.blocks().index(block)
    before = [other for other in others if trace.blocks().index(other) < order]
    for other in (*reversed(before), *others):
        seen = trace.get(other, "index_choice")
        if seen is not None and seen.shape == choice.shape and torch.equal(seen > 0, choice):
            return other
    return None
