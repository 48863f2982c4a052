"""Attention that distils an indexer: what it computes and what it keeps for the backward pass."""

import gc
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from lowlat.ops import indexer_loss
from lowlat.ops.indexer_loss import IndexerObjective, SparseOutput, attend_and_distill
from lowlat.ops.sparse_attention import IndexQueries


def attended(topk: int, **objective: Any) -> SparseOutput:
    """Of 67 tokens, with random inputs."""
    length, heads, width = 67, 2, 4
    generator = torch.Generator().manual_seed(3)
    shapes = [(length, heads, width)] * 3 + [(length, 3, 5), (length, 3), (length, 5)]
    q, k, v, index_q, weights, index_keys = (
        torch.randn(shape, generator=generator).requires_grad_() for shape in shapes
    )
    return attend_and_distill(
        q,
        k,
        v,
        IndexQueries(index_q, weights, topk),
        index_keys,
        None,
        scale=0.5,
        objective=IndexerObjective(sum_heads=lambda x: x, **objective),
    )


def test_attention_keeps_no_masks_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """No bool tensor of blocks of queries outlives the forward pass."""
    monkeypatch.setattr(indexer_loss, "BLOCK_ELEMENTS", 2**10)
    for is_dense in (False, True):
        before = set(map(id, bool_tensors()))
        made = attended(11, is_dense=is_dense, kl_weight=0.1)
        assert not [x.shape for x in bool_tensors() if id(x) not in before]
        made.out.sum().backward()


@pytest.mark.parametrize(
    ("topk", "kl_weight", "blocks"), [(67, None, 0), (67, 0.1, 5), (40, None, 3)]
)
def test_index_scores_are_computed_where_they_are_used(
    topk: int, kl_weight: float | None, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks that choose, or whose KL divergence is asked for: of 67 tokens in blocks of 15."""
    monkeypatch.setattr(indexer_loss, "BLOCK_ELEMENTS", 3 * 67 * 15)
    scored = Mock(side_effect=indexer_loss.index_scores)
    monkeypatch.setattr(indexer_loss, "index_scores", scored)
    attended(topk, is_dense=False, kl_weight=kl_weight)
    assert scored.call_count == blocks


def bool_tensors() -> list[Tensor]:
    found = [each for each in gc.get_objects() if type(each) is Tensor]
    return [tensor for tensor in found if tensor.dtype == torch.bool]
