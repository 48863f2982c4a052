"""Attention of sparse models (DSA) in training: the indexes of the layers of a micro-batch, and
attention that adds the KL loss of the indexer.

With tensor parallelism the target sums the attention of all heads. With context parallelism index
keys are all-gathered as latent entries are.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from lowlat.attention.base import AttentionBackend
from lowlat.ops.indexer_loss import (
    IndexerObjective,
    IndexGradients,
    VarlenAttention,
    add_index_gradients,
    attend_and_distill,
    distills_natively,
)
from lowlat.ops.mla import expand_entries
from lowlat.ops.sparse_attention import IndexQueries


class KeyRange(NamedTuple):
    """Consecutive queries of this process and the keys of their document, as places among all keys
    of the micro-batch.
    """

    begin: int
    """First key."""
    first: int
    """First query; the queries are the last tokens of the keys."""
    end: int
    """After the last query and key."""


class OtherProcesses(NamedTuple):
    """What other processes have of a micro-batch; the default has all in one process."""

    gather: Callable[[Tensor], Tensor] = lambda keys: keys
    """All keys of the micro-batch from those of this process (context parallelism)."""
    copy: Callable[[Tensor], Tensor] = lambda entries: entries
    """Identity on what the heads of all processes read, with summed gradients (tensor
    parallelism)."""
    sum_heads: Callable[[Tensor], Tensor] = lambda x: x
    """The sum over heads of all processes; not differentiable."""


class LayerIndex(NamedTuple):
    """Outputs of the indexer of a layer, and its choice once it is made."""

    queries: IndexQueries
    keys: Float[Tensor, "all_keys index_dim"]
    chosen: list[Tensor | None]
    """Of each range."""


@final
class IndexedAttention(AttentionBackend):
    """Adds the indexes of the layers to the backend `inner`, to which dense attention is left."""

    def __init__(
        self,
        inner: AttentionBackend,
        ranges: Sequence[KeyRange],
        others: OtherProcesses | None = None,
    ) -> None:
        """ranges: the queries of this process, in order."""
        self.inner = inner
        self.ranges = list(ranges)
        self.others = others or OtherProcesses()
        alone = all(span.begin == span.first for span in self.ranges)
        self.has_whole_sequences = alone and self.others == OtherProcesses()
        """Whether this process has all tokens and heads of its sequences."""
        self._indexes: dict[int, LayerIndex] = {}

    def set_index(
        self, layer: int, queries: IndexQueries, keys: Float[Tensor, "tokens index_dim"]
    ) -> None:
        """The outputs of the indexer of `layer`, for this and the layers that share its choice."""
        self._indexes[layer] = LayerIndex(
            queries, self.others.gather(keys), [None] * len(self.ranges)
        )

    def index(self, layer: int) -> LayerIndex:
        """What `set_index` was given for `layer`."""
        return self._indexes[layer]

    def mla(self, *arguments: Any, **named: Any) -> Tensor:
        return self.inner.mla(*arguments, **named)

    def sparse_mla(self, *arguments: Any, **named: Any) -> Tensor:
        return self.inner.sparse_mla(*arguments, **named)

    def gqa(self, *arguments: Any, **named: Any) -> Tensor:
        return self.inner.gqa(*arguments, **named)

    def attend(self, *arguments: Any, **named: Any) -> Tensor:
        return self.inner.attend(*arguments, **named)


@final
class LayerAttention(AttentionBackend):
    """Attention of one layer with the index of layer `source`: adds up `statistics`."""

    def __init__(
        self, backend: IndexedAttention, source: int, *, is_dense: bool, kl_weight: float | None
    ) -> None:
        self._backend = backend
        self._index = backend.index(source)
        self._objective = IndexerObjective(
            is_dense=is_dense, kl_weight=kl_weight, sum_heads=backend.others.sum_heads
        )
        self.statistics = torch.zeros(3, dtype=torch.float64)
        """Those of `ops.indexer_loss.SparseOutput`, over this process's queries."""

    def mla(
        self,
        layer: int,
        q_nope: Float[Tensor, "tokens heads nope_dim"],
        q_rope: Float[Tensor, "tokens heads rope_dim"],
        entries: Float[Tensor, "tokens entry_dim"],
        w_uk: Float[Tensor, "heads nope_dim latent"],
        w_uv: Float[Tensor, "heads v_dim latent"],
        scale: float,
    ) -> Float[Tensor, "tokens heads v_dim"]:
        objective, backend = self._objective, self._backend
        if objective.is_dense and objective.kl_weight is None:
            return backend.mla(layer, q_nope, q_rope, entries, w_uk, w_uv, scale)
        rows = backend.others.gather(backend.others.copy(entries))
        k, v = expand_entries(rows, w_uk, w_uv)
        return self._attend(torch.cat([q_nope, q_rope], dim=-1), k, v, scale)

    def gqa(
        self,
        layer: int,
        q: Float[Tensor, "tokens heads head_dim"],
        k: Float[Tensor, "tokens heads head_dim"],
        v: Float[Tensor, "tokens heads v_dim"],
        scale: float,
        window: int | None,
    ) -> Float[Tensor, "tokens heads v_dim"]:
        """Expanded MLA, of FP8 training: every head has its own keys and values."""
        assert window is None and q.shape[1] == k.shape[1]
        both = self._backend.others.gather(torch.cat([k, v], dim=-1).flatten(1))
        both = both.unflatten(-1, (k.shape[1], -1))
        return self._attend(q, both[..., : k.shape[2]], both[..., k.shape[2] :], scale)

    def sparse_mla(self, *arguments: Any, **named: Any) -> Tensor:
        raise AssertionError("the layer's own attention is sparse already")

    def attend(self, *arguments: Any, **named: Any) -> Tensor:
        raise AssertionError("sparse attention is MLA")

    def _attend(
        self,
        q: Float[Tensor, "tokens heads head_dim"],
        k: Float[Tensor, "all_keys heads head_dim"],
        v: Float[Tensor, "all_keys heads v_dim"],
        scale: float,
    ) -> Float[Tensor, "tokens heads v_dim"]:
        objective, queries, index_keys = self._objective, self._index.queries, self._index.keys
        if objective.is_dense:
            is_native = objective.kl_weight is not None
        else:
            is_native = not torch.is_grad_enabled()
        if is_native and self._backend.has_whole_sequences:
            lengths = [span.end - span.begin for span in self._backend.ranges]
            if distills_natively(q, k, v, queries.q, index_keys):
                return self._attend_natively(VarlenAttention(q, k, v, lengths, scale))
        chosen, outputs, gradients = self._index.chosen, [], []
        first = 0
        for place, span in enumerate(self._backend.ranges):
            own = slice(first, first + span.end - span.first)
            seen = slice(span.begin, span.end)
            found = attend_and_distill(
                q[own],
                k[seen],
                v[seen],
                queries.rows(own),
                index_keys[seen],
                chosen[place],
                scale=scale,
                objective=objective,
            )
            chosen[place] = found.chosen
            outputs.append(found.out)
            gradients.append(found.gradients)
            self.statistics += found.statistics.cpu()
            first = own.stop
        out = torch.cat(outputs)
        if not torch.is_grad_enabled() or objective.kl_weight is None:
            return out
        return add_index_gradients(out, queries, index_keys, self._whole(gradients))

    def _attend_natively(self, given: VarlenAttention) -> Float[Tensor, "tokens heads v_dim"]:
        objective, queries, keys = self._objective, self._index.queries, self._index.keys
        if not objective.is_dense:
            out, statistics = given.attend(queries, keys)
            self.statistics += statistics
            return out
        assert objective.kl_weight is not None
        out, statistics, gradients = given.distill(queries, keys, objective.kl_weight)
        self.statistics += statistics
        if gradients is None:
            return out
        return add_index_gradients(out, queries, keys, gradients)

    def _whole(self, parts: Sequence[IndexGradients | None]) -> IndexGradients:
        """The gradients of all ranges. Ranges of one document add to the same keys."""
        known = [part for part in parts if part is not None]
        assert len(known) == len(self._backend.ranges)
        keys = known[0].keys.new_zeros(self._index.keys.shape)
        for part, span in zip(known, self._backend.ranges, strict=True):
            keys[span.begin : span.end] += part.keys
        return IndexGradients(
            torch.cat([part.q for part in known]), torch.cat([part.weights for part in known]), keys
        )
