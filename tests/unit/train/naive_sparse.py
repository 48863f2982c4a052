"""Sparse attention and its KL loss written out from DeepSeek-V3.2's paper: one query after the
other, all gradients autograd's. What the tests of its training compare with.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowlat.attention.base import AttentionBackend
from lowlat.ops.sparse_attention import IndexQueries


class NaiveSparse(AttentionBackend):
    """Documents of the given lengths, attended to over all tokens (`dense`) or the chosen ones."""

    def __init__(self, lengths: Sequence[int], *, dense: bool) -> None:
        self.lengths = list(lengths)
        self.dense = dense
        self.kl: dict[int, Tensor] = {}
        """Sum over queries of the divergence of every layer."""
        self.recall: dict[int, Tensor] = {}
        self._index: tuple[IndexQueries, Tensor] | None = None

    def sparse_mla(
        self,
        layer: int,
        q_nope: Tensor,
        q_rope: Tensor,
        entries: Tensor,
        w_uk: Tensor,
        w_uv: Tensor,
        scale: float,
        index: IndexQueries | None,
    ) -> Tensor:
        rank, rotary = w_uk.shape[-1], q_rope.shape[-1]
        k_index, latent, k_rope = entries.split(
            [entries.shape[1] - rank - rotary, rank, rotary], dim=1
        )
        if index is not None:
            self._index = (index, k_index)
        assert self._index is not None
        given, keys = self._index
        outputs, recalls, kl = [], [], torch.zeros((), dtype=torch.float64)
        begin = 0
        for length in self.lengths:
            for t in range(begin, begin + length):
                seen = slice(begin, t + 1)
                scores = torch.zeros(t + 1 - begin, dtype=torch.float64)
                for head in range(given.q.shape[1]):
                    product = keys[seen] @ given.q[t, head] / keys.shape[1] ** 0.5
                    scores = scores + given.weights[t, head] * product.clamp(min=0)
                best = scores.detach().sort(descending=True, stable=True).indices[: given.topk]
                attended = torch.arange(t + 1 - begin) if self.dense else best.sort().values
                weights, masses, out = [], [], []
                for head in range(q_nope.shape[1]):
                    k = latent[seen] @ w_uk[head].T
                    logits = scale * (k @ q_nope[t, head] + k_rope[seen] @ q_rope[t, head])
                    share = logits[attended].softmax(0)
                    out.append(share @ (latent[seen] @ w_uv[head].T)[attended])
                    weights.append(share.detach())
                    masses.append(logits.detach().softmax(0)[best].sum())
                outputs.append(torch.stack(out))
                target = torch.stack(weights).sum(0) / len(weights)
                kl = kl + (target * (target.log() - scores[attended].log_softmax(0))).sum()
                if t + 1 - begin > given.topk:
                    recalls.append(torch.stack(masses).mean())
            begin += length
        self.kl[layer] = kl
        self.recall[layer] = torch.stack(recalls).mean()
        return torch.stack(outputs)

    def mla(self, *arguments: Any, **named: Any) -> Tensor:
        raise AssertionError

    def gqa(self, *arguments: Any, **named: Any) -> Tensor:
        raise AssertionError

    def attend(self, *arguments: Any, **named: Any) -> Tensor:
        raise AssertionError
