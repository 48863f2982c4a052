"""Observer: forward hooks that record the parts of a decoder layer, for every implementation.

Maps modules to parts, and derives further parts (attention scores, canonical RoPE channels).
Implementations pass the names of their modules, and record their attention and router themselves.
Observation changes no result unless experts are imposed.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lowlat.compare.trace import EMBEDDING, Block, Trace

Hook = Callable[[Any, Any], Any]
"""Takes (inputs, output) of a module; a return value other than None replaces the output."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleNames:
    """Names of the modules of a decoder layer. Absent modules are not observed."""

    input_norm: str = "input_layernorm"
    attention: str = "self_attn"
    post_norm: str = "post_attention_layernorm"
    mlp: str = "mlp"
    queries: tuple[str, ...] = ("q_norm", "q_b_proj", "q_proj")
    """Submodules of the attention; the first one present outputs the queries before RoPE."""
    keys: tuple[str, ...] = ("k_norm", "k_proj")
    latent: str = "kv_a_proj_with_mqa"
    latent_norm: str = "kv_a_layernorm"
    indexer: str = "indexer"
    gate: str = "gate"
    experts: str = "experts"
    shared: str = "shared_experts"


HF = ModuleNames()
"""Module names in lowlat and in transformers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionShape:
    """Sizes of one layer's attention."""

    heads: int
    dim: int
    """Channels of a query head."""
    rope: int
    """RoPE channels, the last channels of a query head."""
    latent: int | None
    """kv_lora_rank; None for attention without a latent."""
    interleave: bool
    """Whether observed rotated channels are in neighbouring pairs (2i, 2i+1)."""


class Observer:
    """Forward hooks on one model that write to one trace. A context manager that removes them."""

    def __init__(self, trace: Trace, names: ModuleNames = HF) -> None:
        self.trace = trace
        self.names = names
        self._hooks = ExitStack()

    def __enter__(self) -> "Observer":
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def watch(self, module: nn.Module | None, hook: Hook) -> None:
        """Call `hook` after each run of `module`."""
        if module is None:
            return
        handle = module.register_forward_hook(lambda _, inputs, output: hook(inputs, output))
        self._hooks.callback(handle.remove)

    def output(self, block: Block, part: str, module: nn.Module | None) -> None:
        """Record the (first) output of `module` as a part."""
        self.watch(module, lambda _, out: self._record(block, part, out))

    def embedding(self, module: nn.Module | None) -> None:
        """Record the first output of the embedding, because MTP modules run it again."""

        def seen(_: Any, out: Tensor) -> None:
            if self.trace.get(EMBEDDING, "embedding") is None:
                self._record(EMBEDDING, "embedding", out)

        self.watch(module, seen)

    def layer(self, block: Block, layer: nn.Module, widths: AttentionShape) -> None:
        """Observe a decoder layer, except the inside of its attention and router."""
        names = self.names
        attention, mlp = find(layer, names.attention), find(layer, names.mlp)
        self.output(block, "input_norm", find(layer, names.input_norm))
        self.output(block, "attention", attention)
        self.output(block, "post_norm", find(layer, names.post_norm))
        self.output(block, "mlp", mlp)
        self.output(block, "residual", layer)
        norm = find(layer, names.post_norm)
        self.watch(norm, lambda inputs, _: self._record(block, "mid_residual", inputs[0]))
        if find(mlp, names.gate) is not None:
            self.output(block, "routed", find(mlp, names.experts))
            self.output(block, "shared", find(mlp, names.shared))
        self._projections(block, attention, widths)
        self._indexer(block, find(attention, names.indexer))

    def _indexer(self, block: Block, indexer: Any) -> None:
        """Record the inputs of index scores: projections before norm and rotation, and weights."""
        if indexer is None:
            return
        for name, module in (("index_q", indexer.wq_b), ("index_k", indexer.wk)):
            self.watch(module, partial(self._evidence, block, name))
        weights = {
            "index_norm": indexer.k_norm.weight,
            "index_norm_bias": indexer.k_norm.bias,
            "index_head_weight": indexer.weights_proj.weight,
        }
        for name, weight in weights.items():
            self.trace.record_evidence(block, name, weight)

    def _evidence(self, block: Block, name: str, _inputs: Any, out: Tensor) -> None:
        self.trace.record_evidence(block, name, out.reshape(-1, out.shape[-1]))

    def _projections(
        self, block: Block, attention: nn.Module | None, widths: AttentionShape
    ) -> None:
        names, heads = self.names, widths.heads

        def queries(_: Any, out: Tensor) -> None:
            # Projections of other sizes output factors of queries (TPA), or heads already split.
            if out.shape[-1] in (widths.dim, heads * widths.dim):
                self.trace.record(block, "q", out.reshape(-1, heads, widths.dim))

        self.watch(first(attention, names.queries), queries)
        latent = widths.latent
        if latent is None:
            # Key heads are as wide as query heads.
            self.watch(first(attention, names.keys), lambda _, out: self._keys(block, out))
            return

        def split(_: Any, out: Tensor) -> None:
            parts = out.reshape(-1, out.shape[-1])
            self.trace.record(block, "latent", parts[:, :latent])
            self.trace.record(block, "k", parts[:, None, latent:])

        self.watch(find(attention, names.latent), split)
        self.output(block, "latent", find(attention, names.latent_norm))

    def _keys(self, block: Block, out: Tensor) -> None:
        queries = self.trace.get(block, "q")
        if queries is not None:
            self.trace.record(block, "k", out.reshape(len(queries), -1, queries.shape[-1]))

    def _record(self, block: Block, part: str, value: Any) -> None:
        tensor = value[0] if isinstance(value, tuple) else value
        self.trace.record(block, part, tensor.reshape(-1, tensor.shape[-1]))

    def attended(
        self,
        block: Block,
        widths: AttentionShape,
        *,
        q: Float[Tensor, "tokens heads d_qk"],
        k: Float[Tensor, "tokens kv_heads d_qk"],
        v: Float[Tensor, "tokens kv_heads d_v"],
        heads: Float[Tensor, "tokens heads d_v"],
        scale: float,
        window: int | None = None,
    ) -> None:
        """Record the inside of attention: rotated queries, rotated keys of every head, values,
        scores and output.
        """
        q, k = (canonical(x, widths.rope, widths.interleave) for x in (q, k))
        trace, latent = self.trace, widths.latent is not None
        trace.record(block, "v", v)
        trace.record(block, "q_rotated", q)
        trace.record(block, "k_rotated", k[:, :1, k.shape[-1] - widths.rope :] if latent else k)
        trace.record(block, "scores", scores(q, k, scale, window))
        trace.record(block, "heads", heads)
        trace.record_evidence(block, "scale", float(scale))

    def chose(
        self,
        block: Block,
        choice: Bool[Tensor, "tokens tokens"],
        scores: Float[Tensor, "tokens tokens"] | None,
    ) -> None:
        """Record which tokens each query attends to, and the index scores, if observed."""
        if scores is not None:
            self.trace.record(block, "index_scores", scores.tril())
        self.trace.record(block, "index_choice", choice.float())

    def routed(
        self,
        block: Block,
        *,
        scores: Float[Tensor, "tokens experts"] | None,
        chosen: Tensor,
        weights: Float[Tensor, "tokens chosen"],
        gate_weight: Float[Tensor, "experts hidden"],
        gate_bias: Float[Tensor, " experts"] | None,
    ) -> None:
        """Record a router's unbiased scores (if observed), selected experts and routing weights."""
        dense = torch.zeros(len(chosen), len(gate_weight), dtype=weights.dtype)
        if scores is not None:
            self.trace.record(block, "router_scores", scores)
        self.trace.record(block, "routing_weights", dense.scatter_(1, chosen, weights))
        evidence = {"chosen": chosen, "gate_weight": gate_weight, "gate_bias": gate_bias}
        for name, value in evidence.items():
            if value is not None:
                self.trace.record_evidence(block, name, value)


def find(module: nn.Module | None, name: str) -> nn.Module | None:
    """The submodule `name`; None if it is absent or a ModuleList."""
    found = getattr(module, name, None)
    # lowlat's Experts, a subclass, are called; a plain ModuleList never is
    is_called = isinstance(found, nn.Module) and type(found) is not nn.ModuleList
    return found if is_called else None


def first(module: nn.Module | None, names: tuple[str, ...]) -> nn.Module | None:
    """The first submodule of `names` that exists."""
    found = [part for part in (find(module, name) for name in names) if part is not None]
    return found[0] if found else None


def canonical(
    x: Float[Tensor, "tokens heads dim"], rope: int, interleave: bool
) -> Float[Tensor, "tokens heads dim"]:
    """Reorder the last `rope` channels: real parts of all pairs, then imaginary parts."""
    if not interleave:
        return x
    plain, turned = x[..., : x.shape[-1] - rope], x[..., x.shape[-1] - rope :]
    return torch.cat([plain, turned[..., 0::2], turned[..., 1::2]], dim=-1)


def scores(
    q: Float[Tensor, "tokens heads dim"],
    k: Float[Tensor, "tokens kv_heads dim"],
    scale: float,
    window: int | None,
) -> Float[Tensor, "heads tokens tokens"]:
    """Scaled dot products of queries and keys; 0 where masked."""
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.to(kind).transpose(0, 1).unflatten(0, (k.shape[1], -1))
    product = (grouped * scale) @ k.to(kind).permute(1, 2, 0)[:, None]
    place = torch.arange(q.shape[0], device=q.device)
    behind = place[:, None] - place
    seen = (behind >= 0) & (behind < (window or len(place)))
    return product.flatten(0, 1).masked_fill(~seen, 0.0)
