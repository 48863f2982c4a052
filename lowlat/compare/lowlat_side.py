"""lowlat's own models in plain PyTorch, observed module by module."""

import math
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lowlat.attention.base import AttentionBackend
from lowlat.attention.cache import PAGE_SIZE, PagedCache
from lowlat.attention.cached import CachedAttention
from lowlat.attention.metadata import AttentionBatch, SequenceSlice
from lowlat.attention.path import AttentionPath, choose_path
from lowlat.compare.gate import factors
from lowlat.compare.observe import Observer, Widths
from lowlat.compare.side import Side
from lowlat.compare.trace import (
    OUTPUT,
    Block,
    Choices,
    Trace,
    Window,
    block_of,
    layer_number,
)
from lowlat.config.model import GLAConfig, MLAConfig, ModelConfig
from lowlat.model.block import DecoderLayer
from lowlat.model.moe import Gate, MoE
from lowlat.model.transformer import Transformer
from lowlat.ops.layout import EntryLayout
from lowlat.ops.routing import Routing
from lowlat.utils.device import name_of


class LowlatSide(Side):
    """A Transformer over a fresh cache of one sequence."""

    unseen = ""
    takes_choices = True

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
        self.cache_precision = None if cache is None else name_of(cache)
        self.form: AttentionPath | None = form
        """None: the form a request of that length would get."""
        self.cache = cache
        """Number type of the cache; None: the activations'."""

    @torch.no_grad()
    def trace(self, window: Window, choices: Choices | None = None) -> Trace:
        model = self.model
        trace = Trace(dtype=model.embed_tokens.weight.dtype, cached=self.cache)
        with Observer(trace) as observer:
            observer.embedding(model.embed_tokens)
            watch_layers(observer, model, choices or {})
            backend = self._backend(observer, window)
            hidden = model(window.ids, window.positions, backend)
            trace.keep(OUTPUT, "norm", hidden)
            trace.keep(OUTPUT, "logits", model.logits(hidden))
            run_mtp(observer, model, hidden, window, self._backend)
        return trace

    def _backend(self, observer: Observer, window: Window) -> "ObservedAttention":
        attention = self.config.attention
        form = self.form or choose_path(attention, len(window.ids))
        cache, batch = one_sequence(self.model, window, form, self.cache)
        return ObservedAttention(CachedAttention(cache, batch), observer, self.config)


def one_sequence(
    model: Transformer, window: Window, form: AttentionPath, dtype: torch.dtype | None
) -> tuple[PagedCache, AttentionBatch]:
    """An empty cache for `window`, and the step that reads it whole."""
    count = -(-len(window.ids) // PAGE_SIZE)
    kind = dtype or model.embed_tokens.weight.dtype
    cache = PagedCache(model.config, num_pages=count, dtype=kind)
    item = SequenceSlice(pages=tuple(range(count)), start=0, length=len(window.ids), path=form)
    batch = AttentionBatch.build([item], page_size=PAGE_SIZE)
    return cache, replace(batch, positions=window.positions)


def watch_layers(observer: Observer, model: Transformer, choices: Choices) -> None:
    """Watch all decoder layers and MTP modules, and impose `choices` on their gates."""
    depth = [(Block("layer", n), layer) for n, layer in enumerate(model.layers)]
    depth += [(Block("mtp", n), module.block) for n, module in enumerate(model.mtp)]  # type: ignore
    for block, layer in depth:
        assert isinstance(layer, DecoderLayer)
        observer.layer(block, layer, widths_of(model.config, block))
        if isinstance(layer.mlp, MoE):
            _watch_gate(observer, block, layer.mlp.gate, choices.get(block))


def widths_of(config: ModelConfig, block: Block) -> Widths:
    """How the attention of a layer or MTP module is read."""
    layer = layer_number(config, block)
    attention = config.attention_of(layer)
    return Widths(
        heads=attention.num_attention_heads,
        dim=attention.qk_head_dim,
        rope=attention.rope_dim,
        latent=attention.kv_lora_rank if isinstance(attention, MLAConfig | GLAConfig) else None,
        interleave=config.rope_of(layer).rope_interleave,
    )


def _watch_gate(observer: Observer, block: Block, gate: Gate, imposed: Tensor | None) -> None:
    def seen(_: Any, routing: Routing) -> Routing | None:
        if imposed is not None:
            weights = factors(routing.scores.gather(1, imposed), gate.moe)
            routing = Routing(imposed, weights, routing.scores)
        observer.routed(
            block,
            gate=routing.scores,
            chosen=routing.experts,
            weights=routing.weights,
            experts=gate.moe.n_routed_experts,
        )
        observer.trace.note(block, "gate_weight", gate.weight)
        if gate.e_score_correction_bias is not None:
            observer.trace.note(block, "gate_bias", gate.e_score_correction_bias)
        return routing if imposed is not None else None

    observer.watch(gate, seen)


def run_mtp(observer: Observer, model: Transformer, hidden: Tensor, window: Window, backend: Any):
    """Run every MTP module on what the one before it made, and record its input and output."""
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
        trace.keep(block, "norm", hidden)
        trace.keep(block, "logits", model.mtp_logits(depth, hidden))


def watch_join(observer: Observer, block: Block, module: Any) -> None:
    """Record how an MTP module joins embedding and hidden state, and the weights it does so with.

    The modules have the same names in lowlat and in transformers.
    """
    trace = observer.trace

    def note(name: str, value: Tensor) -> None:
        trace.note(block, name, value.reshape(-1, value.shape[-1]))

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
        trace.note(block, name, value)


class ObservedAttention(AttentionBackend):
    """Hands everything on to `inner` and records what goes in and comes out."""

    def __init__(self, inner: CachedAttention, observer: Observer, config: ModelConfig) -> None:
        self.inner = inner
        self.observer = observer
        self.config = config

    def mla(
        self,
        layer: int,
        q_nope: Float[Tensor, "tokens heads nope_dim"],
        q_rope: Float[Tensor, "tokens heads rope_dim"],
        rows: Float[Tensor, "tokens entry_dim"],
        w_uk: Float[Tensor, "heads nope_dim latent"],
        w_uv: Float[Tensor, "heads v_dim latent"],
        scale: float,
    ) -> Float[Tensor, "tokens heads v_dim"]:
        out = self.inner.mla(layer, q_nope, q_rope, rows, w_uk, w_uv, scale)
        latent, k_rope = self._cached(layer, rows).split([w_uk.shape[-1], q_rope.shape[-1]], -1)
        k_nope = torch.einsum("kc,hnc->khn", latent, w_uk)
        k = torch.cat([k_nope, k_rope[:, None].expand(-1, k_nope.shape[1], -1)], dim=-1)
        self.observer.trace.keep(block_of(self.config, layer), "latent", latent)
        self._attended(
            layer,
            q=torch.cat([q_nope, q_rope], dim=-1),
            k=k,
            v=torch.einsum("kc,hvc->khv", latent, w_uv),
            heads=out,
            scale=scale,
        )
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
        rows: Float[Tensor, "tokens entry_dim"],
        layout: EntryLayout,
        scale: float,
    ) -> Float[Tensor, "tokens heads head_dim"]:
        out = self.inner.attend(layer, q, rows, layout, scale)
        k, v = layout.expand(self._cached(layer, rows))
        self._attended(layer, q=q, k=k, v=v, heads=out, scale=scale)
        return out

    def _attended(self, layer: int, **seen: Any) -> None:
        block = block_of(self.config, layer)
        self.observer.attended(block, widths_of(self.config, block), **seen)

    def _cached(self, layer: int, rows: Tensor) -> Float[Tensor, "tokens entry_dim"]:
        """The rows as attention read them, which an int8 cache rounds."""
        (item,) = self.inner.batch.sequences
        cached = self.inner.cache.rows(layer, item.pages, item.context, rows.dtype)
        return cached[:, : math.prod(rows.shape[1:]) * (2 if rows.dim() == 3 else 1)]
