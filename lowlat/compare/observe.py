"""Watches the modules of a decoder layer while they run: the same hooks for every implementation.

Owns which modules make which part and what is derived from what is seen (scores, canonical
channels). Implementations differ in the names of their modules and in how attention and gate are
seen; that is theirs to say. Changes nothing that is computed, except where experts are imposed.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowlat.compare.trace import EMBEDDING, Block, Trace

Hook = Callable[[Any, Any], Any]
"""(inputs, output) of a module; what it returns, if anything, replaces the output."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Names:
    """What the modules of a decoder layer are called. Absent modules are not watched."""

    input_norm: str = "input_layernorm"
    attention: str = "self_attn"
    post_norm: str = "post_attention_layernorm"
    mlp: str = "mlp"
    queries: tuple[str, ...] = ("q_norm", "q_b_proj", "q_proj")
    """Below attention; the first that is there gives the queries before the rotation."""
    keys: tuple[str, ...] = ("k_norm", "k_proj")
    latent: str = "kv_a_proj_with_mqa"
    latent_norm: str = "kv_a_layernorm"
    gate: str = "gate"
    experts: str = "experts"
    shared: str = "shared_experts"


HF = Names()
"""lowlat's modules and those of transformers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Widths:
    """What it takes to read one layer's attention."""

    heads: int
    dim: int
    """Channels of a query."""
    rope: int
    """Rotary channels, the trailing ones of a query."""
    latent: int | None
    """Width of the latent; None for attention without one."""
    interleave: bool
    """Rotated channels lie in neighbouring pairs where they are seen."""


class Observer:
    """Hooks on one model, writing into one trace; leave it to take them off."""

    def __init__(self, trace: Trace, names: Names = HF) -> None:
        self.trace = trace
        self.names = names
        self._hooks = ExitStack()

    def __enter__(self) -> "Observer":
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def watch(self, module: nn.Module | None, hook: Hook) -> None:
        """Call `hook` whenever `module` has run."""
        if module is None:
            return
        handle = module.register_forward_hook(lambda _, inputs, output: hook(inputs, output))
        self._hooks.callback(handle.remove)

    def output(self, block: Block, part: str, module: nn.Module | None) -> None:
        """Keep what `module` returns (the first of several things) as a part."""
        self.watch(module, lambda _, out: self._keep(block, part, out))

    def embedding(self, module: nn.Module | None) -> None:
        """Keep what the embedding returns at first: MTP modules use it again."""

        def seen(_: Any, out: Tensor) -> None:
            if self.trace.get(EMBEDDING, "embedding") is None:
                self._keep(EMBEDDING, "embedding", out)

        self.watch(module, seen)

    def layer(self, block: Block, layer: nn.Module, widths: Widths) -> None:
        """Watch everything of a decoder layer but the inside of its attention and its gate."""
        names = self.names
        attention, mlp = find(layer, names.attention), find(layer, names.mlp)
        self.output(block, "input_norm", find(layer, names.input_norm))
        self.output(block, "attention", attention)
        self.output(block, "post_norm", find(layer, names.post_norm))
        self.output(block, "mlp", mlp)
        self.output(block, "residual", layer)
        norm = find(layer, names.post_norm)
        self.watch(norm, lambda inputs, _: self._keep(block, "middle", inputs[0]))
        if find(mlp, names.gate) is not None:
            self.output(block, "routed", find(mlp, names.experts))
            self.output(block, "shared", find(mlp, names.shared))
        self._projections(block, attention, widths)

    def _projections(self, block: Block, attention: nn.Module | None, widths: Widths) -> None:
        names, heads = self.names, widths.heads

        def queries(_: Any, out: Tensor) -> None:
            # Projections of other widths give factors of queries (TPA), or heads already split.
            if out.shape[-1] in (widths.dim, heads * widths.dim):
                self.trace.keep(block, "q", out.reshape(-1, heads, widths.dim))

        self.watch(first(attention, names.queries), queries)
        latent = widths.latent
        if latent is None:
            # Keys come in heads as wide as the queries'.
            self.watch(first(attention, names.keys), lambda _, out: self._keys(block, out))
            return

        def split(_: Any, out: Tensor) -> None:
            parts = out.reshape(-1, out.shape[-1])
            self.trace.keep(block, "latent", parts[:, :latent])
            self.trace.keep(block, "k", parts[:, None, latent:])

        self.watch(find(attention, names.latent), split)
        self.output(block, "latent", find(attention, names.latent_norm))

    def _keys(self, block: Block, out: Tensor) -> None:
        queries = self.trace.get(block, "q")
        if queries is not None:
            self.trace.keep(block, "k", out.reshape(len(queries), -1, queries.shape[-1]))

    def _keep(self, block: Block, part: str, value: Any) -> None:
        tensor = value[0] if isinstance(value, tuple) else value
        self.trace.keep(block, part, tensor.reshape(-1, tensor.shape[-1]))

    def attended(
        self,
        block: Block,
        widths: Widths,
        *,
        q: Float[Tensor, "tokens heads d_qk"],
        k: Float[Tensor, "tokens kv_heads d_qk"],
        v: Float[Tensor, "tokens kv_heads d_v"],
        heads: Float[Tensor, "tokens heads d_v"],
        scale: float,
        window: int | None = None,
    ) -> None:
        """Record the inside of an attention: rotated queries and keys (of every head, so that q k
        is a score), values, result.
        """
        q, k = (canonical(x, widths.rope, widths.interleave) for x in (q, k))
        trace, latent = self.trace, widths.latent is not None
        trace.keep(block, "v", v)
        trace.keep(block, "q_rotated", q)
        trace.keep(block, "k_rotated", k[:, :1, k.shape[-1] - widths.rope :] if latent else k)
        trace.keep(block, "scores", scores(q, k, scale, window))
        trace.keep(block, "heads", heads)
        trace.note(block, "scale", float(scale))

    def routed(
        self,
        block: Block,
        *,
        gate: Float[Tensor, "tokens experts"] | None,
        chosen: Tensor,
        weights: Float[Tensor, "tokens chosen"],
        experts: int,
    ) -> None:
        """Record a gate's unbiased scores, where they are seen, the experts it chose out of so
        many, and their factors.
        """
        dense = torch.zeros(len(chosen), experts, dtype=weights.dtype)
        if gate is not None:
            self.trace.keep(block, "gate", gate)
        self.trace.keep(block, "router", dense.scatter_(1, chosen, weights))
        self.trace.note(block, "chosen", chosen)


def find(module: nn.Module | None, name: str) -> nn.Module | None:
    """The submodule called `name`, None where it is absent or a list."""
    found = getattr(module, name, None)
    return found if isinstance(found, nn.Module) and not _is_list(found) else None


def _is_list(module: nn.Module) -> bool:
    """A plain list of modules, which never runs as one (lowlat's Experts is a list that does)."""
    return type(module) is nn.ModuleList


def first(module: nn.Module | None, names: tuple[str, ...]) -> nn.Module | None:
    """The first submodule of `names` that is there."""
    found = [part for part in (find(module, name) for name in names) if part is not None]
    return found[0] if found else None


def canonical(
    x: Float[Tensor, "tokens heads dim"], rope: int, interleave: bool
) -> Float[Tensor, "tokens heads dim"]:
    """The trailing `rope` channels as real parts, then imaginary parts of all pairs."""
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
    """Scaled products of queries and the keys they see; 0 elsewhere."""
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.to(kind).transpose(0, 1).unflatten(0, (k.shape[1], -1))
    product = (grouped * scale) @ k.to(kind).permute(1, 2, 0)[:, None]
    place = torch.arange(q.shape[0], device=q.device)
    behind = place[:, None] - place
    seen = (behind >= 0) & (behind < (window or len(place)))
    return product.flatten(0, 1).masked_fill(~seen, 0.0)
