"""Index scores by hand, an exact choice with ties, and attention over the chosen rows alone."""

import math

import pytest
import torch
from torch import Tensor

from lowlat.ops import sparse_attention
from lowlat.ops.mla import absorbed_mla, expanded_mla
from lowlat.ops.sparse_attention import (
    IndexQueries,
    attended_mask,
    choose_tokens,
    chosen_mla,
    index_scores,
    num_dense,
    sparse_mla,
    top_positions,
)

HEADS, WIDTH, TOPK = 3, 5, 4


def drawn_index(tokens: int, dtype: torch.dtype = torch.float64) -> IndexQueries:
    q = torch.randn(tokens, HEADS, WIDTH, dtype=dtype)
    return IndexQueries(q, torch.randn(tokens, HEADS, dtype=dtype), TOPK)


def drawn_mla(queries: int, keys: int) -> tuple[Tensor, ...]:
    """q_nope, q_rope, rows, w_uk, w_uv."""
    shapes = ((queries, 3, 5), (queries, 3, 4), (keys, 17), (3, 5, 13), (3, 7, 13))
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


def best(scores: list[float], topk: int) -> list[int]:
    """The definition: by score, then by position."""
    order = sorted(range(len(scores)), key=lambda place: (-scores[place], place))
    return sorted(order[:topk])


def test_scores_by_hand() -> None:
    """I = sum_h w_h relu(q_h . k / sqrt(d)), with weights of both signs."""
    index, keys = drawn_index(2), torch.randn(7, WIDTH, dtype=torch.float64)
    found = index_scores(index, keys)
    for token in range(2):
        for key in range(7):
            total = 0.0
            for head in range(HEADS):
                product = float(index.q[token, head] @ keys[key]) / math.sqrt(WIDTH)
                total += float(index.weights[token, head]) * max(product, 0.0)
            assert found[token, key].item() == pytest.approx(total, abs=1e-12)
    assert found.min() < 0 < found.max()


def test_scores_of_narrow_inputs_are_fp32() -> None:
    index = drawn_index(2, torch.bfloat16)
    index = index._replace(weights=index.weights.float())
    keys = torch.randn(7, WIDTH).bfloat16()
    wide = IndexQueries(index.q.double(), index.weights.double(), TOPK)
    found = index_scores(index, keys)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), index_scores(wide, keys.double()), atol=1e-6, rtol=0)


def test_ties_go_to_the_lowest_positions() -> None:
    """Of equal scores, of 0 and of -0, the lowest positions win; the order is by position."""
    rows = [
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
        [0.0, -0.0, 2.0, 0.0, -0.0, 0.0],
        [-0.0, -1.0, 0.0, 3.0, -0.0, 0.0],
        [-5.0, -4.0, -4.0, -4.0, -4.0, -3.0],
    ]
    found = top_positions(torch.tensor(rows), start=5, topk=4)
    # query 3 is at position 8, but all six keys are visible to all
    assert found.tolist() == [best(row, 4) for row in rows]
    assert found[1].tolist() == [0, 1, 2, 3] and found[2].tolist() == [0, 2, 3, 4]


@pytest.mark.parametrize("topk", [1, 4, 9])
def test_the_choice_is_exact(topk: int) -> None:
    """Against sorting by hand, with many ties, at every position."""
    scores = torch.randint(-2, 3, (31, 40)).float() * torch.tensor(0.5)
    found = top_positions(scores, start=9, topk=topk)
    for query, row in enumerate(scores.tolist()):
        assert found[query].tolist() == best(row[: 9 + query + 1], topk)


def test_later_tokens_are_masked_before_the_choice() -> None:
    scores = torch.zeros(2, 9)
    scores[:, 6:] = 100.0
    assert top_positions(scores, start=4, topk=3).tolist() == [[0, 1, 2]] * 2


def test_a_score_that_is_not_a_number_is_chosen() -> None:
    scores = torch.tensor([[5.0, 4.0, math.nan, 3.0, math.inf]])
    assert top_positions(scores, start=4, topk=2).tolist() == [[2, 4]]


def test_queries_without_a_choice_attend_to_all_that_is_visible() -> None:
    visible = torch.ones(4, 5, dtype=torch.bool).tril(1)
    found = attended_mask(visible, torch.tensor([[0, 3], [1, 4]], dtype=torch.int32))
    rows = [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [0, 1, 0, 0, 1]]
    assert found.int().tolist() == rows
    assert torch.equal(attended_mask(visible, torch.empty(0, 9, dtype=torch.int32)), visible)


def test_chunks_and_blocks_choose_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the cuts of a prompt nor the blocks of computation change a choice."""
    index, keys = drawn_index(23), torch.randn(23, WIDTH, dtype=torch.float64)
    whole = choose_tokens(index, keys, start=0)
    assert whole.shape == (23 - TOPK, TOPK)
    parts = [
        choose_tokens(index.rows(slice(first, first + 5)), keys[: first + 5], start=first)
        for first in range(0, 23, 5)
    ]
    assert torch.equal(torch.cat(parts), whole)
    monkeypatch.setattr(sparse_attention, "BLOCK_ELEMENTS", 2 * HEADS * 23)
    assert torch.equal(choose_tokens(index, keys, start=0), whole)


@pytest.mark.parametrize(
    ("count", "start", "dense"), [(3, 0, 3), (9, 0, 4), (3, 2, 2), (3, 4, 0), (1, 3, 1), (1, 99, 0)]
)
def test_queries_that_see_at_most_topk_tokens(count: int, start: int, dense: int) -> None:
    assert num_dense(count, start, TOPK) == dense


def test_attention_over_the_chosen_is_dense_attention_with_a_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Naive: all keys and values expanded, softmax over the chosen alone."""
    q_nope, q_rope, rows, w_uk, w_uv = drawn_mla(6, 11)
    chosen = torch.stack([torch.randperm(11)[:TOPK].sort().values for _ in range(6)])
    latent, k_rope = rows[:, :13], rows[:, 13:]
    k = torch.cat(
        [torch.einsum("kc,hnc->khn", latent, w_uk), k_rope[:, None].expand(-1, 3, -1)], -1
    )
    scores = torch.einsum("qhd,khd->hqk", torch.cat([q_nope, q_rope], -1), k) * 0.3
    masked = torch.ones(6, 11, dtype=torch.bool).scatter(1, chosen, False)
    weights = scores.masked_fill(masked, -math.inf).softmax(-1)
    naive = torch.einsum("hqk,khv->qhv", weights, torch.einsum("kc,hvc->khv", latent, w_uv))
    found = chosen_mla(q_nope, q_rope, rows, w_uk, w_uv, chosen, scale=0.3)
    torch.testing.assert_close(found, naive, rtol=0, atol=1e-12)
    monkeypatch.setattr(sparse_attention, "BLOCK_ELEMENTS", 2 * TOPK * 17)
    blocks = chosen_mla(q_nope, q_rope, rows, w_uk, w_uv, chosen, scale=0.3)
    torch.testing.assert_close(blocks, found, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dense", [absorbed_mla, expanded_mla])
def test_all_chosen_is_dense(dense: object) -> None:
    """Queries beyond top-k that see as many tokens as they choose equal dense attention."""
    inputs = drawn_mla(9, 9)
    everything = dense(*inputs, start=0, scale=0.3)  # type: ignore[operator]
    chosen = torch.arange(9).expand(1, 9)
    last = chosen_mla(inputs[0][-1:], inputs[1][-1:], *inputs[2:], chosen, scale=0.3)
    torch.testing.assert_close(last, everything[-1:], rtol=0, atol=1e-12)
    none = torch.empty(0, 9, dtype=torch.int64)
    found = sparse_mla(*inputs, none, start=0, scale=0.3, dense=dense)  # type: ignore[arg-type]
    assert torch.equal(found, everything)
