"""KL loss of the indexer (DSA) in its dense warm-up: the native kernel against PyTorch in fp64."""

import pytest
import torch
from torch import Tensor

from lowlat.ops import native
from lowlat.ops.indexer_loss import (
    IndexerObjective,
    VarlenAttention,
    attend_and_distill,
    distills_natively,
)
from lowlat.ops.sparse_attention import IndexQueries

from .test_training import LEVELS, close, draw

LENGTHS = [(130, 64, 1, 31, 257), (77,)]
HEADS = [(4, 4, 48, 8, 32), (6, 2, 24, 3, 13), (3, 1, 7, 5, 40)]
"""Heads, KV heads and their width; index heads and their width."""
TOPK, SCALE, WEIGHT = 23, 0.3, 0.01
STATISTICS = {1, 6}
"""Places of statistics in what `distilled` returns."""


def inputs(
    count: int, heads: int, kv_heads: int, width: int, index_heads: int, index_width: int
) -> list[Tensor]:
    shapes = [
        (count, heads, width),
        (count, kv_heads, width),
        (count, kv_heads, width),
        (count, index_heads, index_width),
        (count, index_width),
    ]
    made = [draw(*shape, dtype=torch.bfloat16, seed=n) for n, shape in enumerate(shapes)]
    return [*made, draw(count, index_heads, dtype=torch.float32, seed=9)]


def distilled(given: list[Tensor], lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Dense output, statistics, gradients; then output and statistics over the chosen tokens."""
    q, k, v, index_q, index_k, weights = given
    packed, index = (
        VarlenAttention(q, k, v, list(lengths), SCALE),
        IndexQueries(index_q, weights, TOPK),
    )
    out, statistics, gradients = packed.distill(index, index_k, WEIGHT)
    assert gradients is not None
    return out, statistics, *gradients, *packed.attend(index, index_k)


def expected(given: list[Tensor], lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
    objective = IndexerObjective(is_dense=True, kl_weight=WEIGHT, sum_heads=lambda x: x)
    sparse = IndexerObjective(is_dense=False, kl_weight=0.0, sum_heads=lambda x: x)
    found = []
    for parts in zip(*(x.double().split(lengths) for x in given), strict=True):
        q, k, v, index_q, index_k, weights = parts
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        index = IndexQueries(index_q, weights, TOPK)
        attended = (q, k, v, index, index_k, None)
        one = attend_and_distill(*attended, scale=SCALE, objective=objective)
        over = attend_and_distill(*attended, scale=SCALE, objective=sparse)
        assert one.gradients is not None
        found.append(
            (one.out, one.statistics[None], *one.gradients, over.out, over.statistics[None])
        )
    joined = [torch.cat(each) for each in zip(*found, strict=True)]
    return tuple(x.sum(dim=0) if n in STATISTICS else x for n, x in enumerate(joined))


@pytest.mark.parametrize("level", LEVELS, indirect=True)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("sizes", HEADS)
def test_native_indexer_loss(level: str, lengths: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    """Outputs, divergence and recall, and the gradients of all outputs of the indexer."""
    given = inputs(sum(lengths), *sizes)
    found, wanted = distilled(given, lengths), expected(given, lengths)
    assert found[6][0].isnan()
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[6][1:], wanted[6][1:], rtol=1e-4, atol=1e-4)
    for place in {*range(len(found))} - STATISTICS:
        close(found[place], wanted[place], torch.bfloat16)


@pytest.mark.parametrize("level", LEVELS, indirect=True)
def test_bits_depend_on_the_sequence_alone(level: str) -> None:
    """Not on the threads, nor on the other sequences of the batch."""
    given = inputs(130 + 257, *HEADS[0])
    found = distilled(given, (130, 257))
    threads = native.module().threads()
    try:
        native.module().set_threads(1)
        alone = distilled(given, (130, 257))
        last = distilled([x[130:] for x in given], (257,))
    finally:
        native.module().set_threads(threads)
    for place in {*range(len(found))} - STATISTICS:
        assert found[place].equal(alone[place])
        assert found[place][130:].equal(last[place])


@pytest.mark.skipif(not native.available(), reason="no native kernels")
def test_what_the_kernel_takes() -> None:
    q, k, v, index_q, index_k, _ = inputs(5, 2, 2, 8, 3, 8)
    assert distills_natively(q, k, v, index_q.clone().requires_grad_(), index_k)
    assert not distills_natively(q.clone().requires_grad_(), k, v, index_q, index_k)
    assert not distills_natively(*(x.float() for x in (q, k, v, index_q, index_k)))
