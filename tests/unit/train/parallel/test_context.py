"""Sequences divided among processes: who has which tokens, and attention over all of them."""

from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lowlat.attention.flash import FlashAttention
from lowlat.data.batch import Batch
from lowlat.train.parallel import context
from lowlat.train.parallel.context import ContextAttention, Zigzag

SIZE, LENGTH = 3, 30
DOCUMENTS = [(7, 11, 12), (30,), (29, 1), (5, 5, 20)]


def own_tokens(rows: int, place: int) -> Tensor:
    """Indices of the tokens of a process in all of the batch."""
    chunk = LENGTH // (2 * SIZE)
    indices = torch.arange(rows * LENGTH).view(rows, 2 * SIZE, chunk)
    return indices[:, list(Zigzag(SIZE, place).chunks)].flatten()


def test_every_token_is_an_input_once_with_what_follows_it() -> None:
    rows, num_ahead = 5, 3
    tokens = torch.arange(rows * (LENGTH + num_ahead)).view(rows, -1)
    batch = Batch(tokens=tokens, loss_mask=tokens % 2 == 0)
    inputs = []
    for place in range(SIZE):
        own = Zigzag(SIZE, place).divide(batch, num_ahead)
        assert torch.equal(own.loss_mask, own.tokens % 2 == 0)
        assert torch.equal(own.tokens, own.tokens[:, :1] + torch.arange(own.tokens.shape[1]))
        inputs += own.tokens[:, :-num_ahead].flatten().tolist()
    assert sorted(inputs) == tokens[:, :LENGTH].flatten().tolist()


def test_causal_work_is_the_same_for_all() -> None:
    for place in range(SIZE):
        pieces = Zigzag(SIZE, place).pieces([(LENGTH,)])
        work = sum(piece.first + piece.end for piece in pieces)
        assert work == 2 * LENGTH


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_attention_is_that_of_whole_sequences(
    window: int | None, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = len(DOCUMENTS) * LENGTH
    q = torch.randn(tokens, 4, 7, dtype=torch.float64)
    k = torch.randn(tokens, kv_heads, 7, dtype=torch.float64)
    v = torch.randn(tokens, kv_heads, 5, dtype=torch.float64)
    alone = FlashAttention([length for row in DOCUMENTS for length in row])
    expected = alone.gqa(0, q, k, padded(v, 7), 0.3, window)[..., :5]
    places = [own_tokens(len(DOCUMENTS), place) for place in range(SIZE)]
    everything = torch.cat([k, padded(v, 7)], dim=-1).flatten(1)
    parts = torch.cat([everything[place] for place in places])
    monkeypatch.setattr(context, "all_gather", lambda own, group: parts)
    for place, indices in enumerate(places):
        attention = ContextAttention(DOCUMENTS, Zigzag(SIZE, place), Mock(spec=dist.ProcessGroup))
        assert torch.equal(attention.positions(), alone.positions()[indices])
        found = attention.gqa(0, q[indices], k[indices], padded(v, 7)[indices], 0.3, window)[
            ..., :5
        ]
        torch.testing.assert_close(found, expected[indices], rtol=1e-12, atol=1e-12)


def padded(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[-1]))
