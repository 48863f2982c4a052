"""lowlat's models in plain PyTorch, observed module by module."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lowlat.attention.base import AttentionBackend
from lowlat.attention.cache import PAGE_SIZE, PagedCache
from lowlat.attention.cached import CachedAttention
from lowlat.attention.metadata import AttentionBatch, SequenceSlice
from lowlat.attention.path import AttentionPath, choose_path
from lowlat.compare.diagnosis.gate_reference import routing_weights
from lowlat.compare.implementations.base import Implementation
from lowlat.compare.observe import AttentionShape, Observer
from lowlat.compare.trace import (
    NONE_IMPOSED,
    OUTPUT,
    Block,
    ChosenTokens,
    ImposedChoices,
    RoutedExperts,
    Trace,
    Window,
    block_of,
    layer_number,
)
from lowlat.config.model import GLAConfig, MLAConfig, ModelConfig
from lowlat.model.block import DecoderLayer
from lowlat.model.moe import Gate, MoE
from lowlat.model.transformer import Transformer
from lowlat.ops import sparse_attention
from lowlat.ops.layout import EntryLayout
from lowlat.ops.mla import absorbed_mla, expand_entries, expanded_mla
from lowlat.ops.routing import Routing
from lowlat.ops.sparse_attention import IndexQueries
from lowlat.utils.device import dtype_name


class LowlatModel(Implementation):
    """A Transformer with an empty KV cache of one sequence."""

    def __init__(
        self,
        model: Transformer,
        *,
        label: str,
        precision: str,
        form: AttentionPath | None = None,
        cache: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.label = label
        self.config = model.config
        self.precision = precision
        self.cache_precision = None if cache is None else dtype_name(cache)
        self.form: AttentionPath | None = form
        """Attention path; None: the one that a request of that length takes."""
        self.cache = cache
        """Data type of the KV cache; None: that of the activations."""


class LowlatPyTorch(LowlatModel):
    """A Transformer in plain PyTorch."""

    unseen = ""
    can_impose_experts = can_impose_tokens = True

    @torch.no_grad()
    def trace(self, window: Window, imposed: ImposedChoices = NONE_IMPOSED) -> Trace:
        model = self.model
        trace = Trace(dtype=model.embed_tokens.dtype, cached=self.cache)
        with Observer(trace) as observer:
            observer.embedding(model.embed_tokens)
            watch_layers(observer, model, imposed.experts)
            new_backend = partial(self._backend, imposed.tokens)
            hidden = model(window.ids, window.positions, new_backend(observer, window))
            trace.record(OUTPUT, "norm", hidden)
            trace.record(OUTPUT, "logits", model.logits(hidden))
            run_mtp(observer, model, hidden, window, new_backend)
        return trace

    def _backend(
        self, tokens: ChosenTokens, observer: Observer, window: Window
    ) -> "ObservedAttention":
        attention = self.config.attention
        form = self.form or choose_path(attention, len(window.ids))
        cache, batch = one_sequence(self.model, window, form, self.cache)
        return ObservedAttention(CachedAttention(cache, batch), observer, self.config, tokens)


def one_sequence(
    model: Transformer, window: Window, form: AttentionPath, dtype: torch.dtype | None
) -> tuple[PagedCache, AttentionBatch]:
    """An empty KV cache, and the batch that prefills `window` in one step."""
    count = -(-len(window.ids) // PAGE_SIZE)
    kind = dtype or model.embed_tokens.dtype
    cache = PagedCache(model.config, num_pages=count, dtype=kind)
    item = SequenceSlice(pages=tuple(range(count)), start=0, length=len(window.ids), path=form)
    batch = AttentionBatch.build([item], page_size=PAGE_SIZE)
    return cache, replace(batch, positions=window.positions)


def watch_layers(observer: Observer, model: Transformer, experts: RoutedExperts) -> None:
    """Observe all decoder layers and MTP modules, and impose `experts` on their routers."""
    depth = [(Block("layer", n), layer) for n, layer in enumerate(model.layers)]
    depth += [(Block("mtp", n), module.block) for n, module in enumerate(model.mtp)]  # type: ignore
    for block, layer in depth:
        assert isinstance(layer, DecoderLayer)
        observer.layer(block, layer, attention_shape(model.config, block))
        if isinstance(layer.mlp, MoE):
            _watch_gate(observer, block, layer.mlp.gate, experts.get(block))


def attention_shape(config: ModelConfig, block: Block) -> AttentionShape:
    """Sizes of the attention of a layer or MTP module."""
    layer = layer_number(config, block)
    attention = config.attention_of(layer)
    return AttentionShape(
        heads=attention.num_attention_heads,
        dim=attention.qk_head_dim,
        rope=attention.rope_dim,
        latent=attention.kv_lora_rank if isinstance(attention, MLAConfig | GLAConfig) else None,
        interleave=config.rope_of(layer).rope_interleave,
    )


def _watch_gate(observer: Observer, block: Block, gate: Gate, imposed: Tensor | None) -> None:
    def seen(_: Any, routing: Routing) -> Routing | None:
        if imposed is not None:
            weights = routing_weights(routing.scores.gather(1, imposed), gate.moe)
            routing = Routing(imposed, weights, routing.scores)
        observer.routed(
            block,
            scores=routing.scores,
            chosen=routing.experts,
            weights=routing.weights,
            gate_weight=gate.weight,
            gate_bias=gate.e_score_correction_bias,
        )
        return routing if imposed is not None else None

    observer.watch(gate, seen)


def run_mtp(observer: Observer, model: Transformer, hidden: Tensor, window: Window, backend: Any):
    """Run the MTP modules one after the other, and record their inputs and outputs."""
    trace, ids = observer.trace, window.ids
    for depth, module in enumerate(model.mtp):
        block, ahead = Block("mtp", depth), ids[depth + 1 :]
        if len(ahead) == 0:
            return
        watch_join(observer, block, module)
        part = Window(ahead, window.start + depth + 1)
        hidden = model.mtp_hidden(
            depth, hidden[: len(ahead)], ahead, part.positions, backend(observer, part)
        )
        trace.record(block, "norm", hidden)
        trace.record(block, "logits", model.mtp_logits(depth, hidden))


def watch_join(observer: Observer, block: Block, module: Any) -> None:
    """Record the inputs, norms and eh_proj of an MTP module, whose submodules have the same names
    in lowlat and in transformers.
    """
    trace = observer.trace

    def note(name: str, value: Tensor) -> None:
        trace.record_evidence(block, name, value.reshape(-1, value.shape[-1]))

    observer.watch(module.enorm, lambda inputs, _: note("embedded", inputs[0]))
    observer.watch(module.hnorm, lambda inputs, _: note("carried", inputs[0]))
    observer.output(block, "joined", module.eh_proj)
    weight = module.eh_proj.weight
    if not weight.is_floating_point() or weight.element_size() == 1:
        weight = module.eh_proj.dense_weight(torch.float32)
    for name, value in (
        ("enorm", module.enorm.weight),
        ("hnorm", module.hnorm.weight),
        ("eh_proj", weight),
    ):
        trace.record_evidence(block, name, value)


class ObservedAttention(AttentionBackend):
    """Delegates to `inner` and records inputs and outputs."""

    def __init__(
        self,
        inner: CachedAttention,
        observer: Observer,
        config: ModelConfig,
        tokens: ChosenTokens,
    ) -> None:
        """tokens: of the blocks that attend to other tokens than their indexer chooses."""
        self.inner = inner
        self.observer = observer
        self.config = config
        self.tokens = tokens

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
        out = self.inner.mla(layer, q_nope, q_rope, entries, w_uk, w_uv, scale)
        rows = self._cached(layer, entries)
        self._latent_attended(layer, q_nope, q_rope, rows, w_uk, w_uv, out, scale)
        return out

    def _latent_attended(
        self,
        layer: int,
        q_nope: Tensor,
        q_rope: Tensor,
        rows: Tensor,
        w_uk: Tensor,
        w_uv: Tensor,
        out: Tensor,
        scale: float,
    ) -> None:
        latent = rows[:, : w_uk.shape[-1]]
        self.observer.trace.record(block_of(self.config, layer), "latent", latent)
        k, v = expand_entries(rows, w_uk, w_uv)
        q = torch.cat([q_nope, q_rope], dim=-1)
        self._attended(layer, q=q, k=k, v=v, heads=out, scale=scale)

    def sparse_mla(
        self,
        layer: int,
        q_nope: Float[Tensor, "tokens heads nope_dim"],
        q_rope: Float[Tensor, "tokens heads rope_dim"],
        entries: Float[Tensor, "tokens entry_dim"],
        w_uk: Float[Tensor, "heads nope_dim latent"],
        w_uv: Float[Tensor, "heads v_dim latent"],
        scale: float,
        index: IndexQueries | None,
    ) -> Float[Tensor, "tokens heads v_dim"]:
        out = self.inner.sparse_mla(layer, q_nope, q_rope, entries, w_uk, w_uv, scale, index)
        rows = self._cached(layer, entries)
        (chosen,), (item,) = self.inner.chosen, self.inner.batch.sequences
        imposed = self.tokens.get(block_of(self.config, layer))
        if imposed is not None and len(chosen):
            positions = imposed[-len(chosen) :].nonzero()[:, 1].view(chosen.shape)
            dense = expanded_mla if item.path == "expanded" else absorbed_mla
            up = (w_uk, w_uv, positions)
            out = sparse_attention.sparse_mla(
                q_nope, q_rope, rows, *up, start=item.start, scale=scale, dense=dense
            )
        self._latent_attended(layer, q_nope, q_rope, rows, w_uk, w_uv, out, scale)
        scores = None
        if index is not None:
            keys = self.inner.cache.read_index_keys(layer, item.pages, item.context, rows.dtype)
            scores = sparse_attention.index_scores(index, keys)
        visible = torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
        choice = sparse_attention.attended_mask(visible, chosen)
        self.observer.chose(block_of(self.config, layer), choice, scores)
        return out

    def gqa(
        self,
        layer: int,
        q: Float[Tensor, "tokens heads head_dim"],
        k: Float[Tensor, "tokens kv_heads head_dim"],
        v: Float[Tensor, "tokens kv_heads head_dim"],
        scale: float,
        window: int | None,
    ) -> Float[Tensor, "tokens heads head_dim"]:
        out = self.inner.gqa(layer, q, k, v, scale, window)
        cached = self._cached(layer, k).unflatten(1, (2, *k.shape[1:]))
        k, v = cached[:, 0], cached[:, 1]
        self._attended(layer, q=q, k=k, v=v, heads=out, scale=scale, window=window)
        return out

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "tokens heads head_dim"],
        entries: Float[Tensor, "tokens entry_dim"],
        layout: EntryLayout,
        scale: float,
    ) -> Float[Tensor, "tokens heads head_dim"]:
        out = self.inner.attend(layer, q, entries, layout, scale)
        k, v = layout.expand(self._cached(layer, entries))
        self._attended(layer, q=q, k=k, v=v, heads=out, scale=scale)
        return out

    def _attended(self, layer: int, **seen: Any) -> None:
        block = block_of(self.config, layer)
        self.observer.attended(block, attention_shape(self.config, block), **seen)

    def _cached(self, layer: int, rows: Tensor) -> Float[Tensor, "tokens entry_dim"]:
        """The KV cache entries as read by attention; an int8 cache rounds them."""
        (item,) = self.inner.batch.sequences
        cached = self.inner.cache.read(layer, item.pages, item.context, rows.dtype)
        return cached[:, : math.prod(rows.shape[1:]) * (2 if rows.dim() == 3 else 1)]
