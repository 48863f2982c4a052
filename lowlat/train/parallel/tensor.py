"""Tensor parallelism: heads and MLP channels divided among processes that have the same tokens
(Megatron-LM, arXiv 1909.08053 section 3).

Owns which matrices are cut along which dimension and where activations are joined again; hooks do
it, the model's own code is untouched. MLA's latent projections, gates, norms, embedding and head
stay whole in every process, and so do the residual stream and the loss.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, final

import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from lowlat.attention.base import AttentionBackend
from lowlat.config.attention import distinct
from lowlat.config.model import GQAConfig, MLAConfig, ModelConfig
from lowlat.model.block import DecoderLayer
from lowlat.model.gqa import GQA
from lowlat.model.linear import Linear
from lowlat.model.mla import MLA
from lowlat.model.moe import MoE
from lowlat.ops.layout import EntryLayout
from lowlat.ops.routing import Routing
from lowlat.train.parallel.collectives import copied, summed
from lowlat.train.parallel.division import Cut
from lowlat.utils.errors import UserError

AXIS = "tensor"
COLUMNS = Cut(axis=AXIS, dim=0)
"""Output channels of a projection."""
ROWS = Cut(axis=AXIS, dim=1)
"""Input channels of a projection."""
INNER_OF_GATE_UP = Cut(axis=AXIS, dim=1, blocks=2)
INNER_OF_DOWN = Cut(axis=AXIS, dim=2)


def check_divisible(config: ModelConfig, size: int, origin: str) -> None:
    """Raises UserError where `size` processes cannot divide a model of `config`."""
    attention, moe = config.attention, config.moe
    where = f"{origin}: parallel.tensor {size}"
    for layer in distinct(attention):
        if not isinstance(layer, MLAConfig | GQAConfig):
            raise UserError(f"{where}: only MLA and GQA are divided; leave it at 1")
        if layer.o_bias or (isinstance(layer, MLAConfig) and layer.attention_bias):
            raise UserError(f"{where}: an o_proj with a bias is not divided; leave it at 1")
    sizes = [
        ("num_attention_heads", config.num_attention_heads),
        ("intermediate_size", config.intermediate_size),
    ]
    for layer in distinct(attention):
        if isinstance(layer, GQAConfig):
            sizes.append(("num_key_value_heads", layer.num_key_value_heads))
    if moe is not None:
        sizes.append(("moe_intermediate_size", moe.moe_intermediate_size))
    for field, count in sizes:
        if count % size:
            raise UserError(f"{where} does not divide {field} {count}; choose one that does")


def cuts(layer: DecoderLayer) -> Iterator[tuple[nn.Parameter, Cut]]:
    """How the parameters of `layer` are divided; those not named stay whole."""
    attention = layer.self_attn
    if isinstance(attention, MLA):
        yield from _linear(_queries(attention), COLUMNS)
        yield from _linear(attention.kv_b_proj, COLUMNS)
    else:
        assert isinstance(attention, GQA)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            yield from _linear(projection, COLUMNS)
    yield attention.o_proj.weight, ROWS
    mlp = layer.mlp
    if isinstance(mlp, MoE):
        yield mlp.experts.gate_up_proj, INNER_OF_GATE_UP  # pyright: ignore[reportReturnType]
        yield mlp.experts.down_proj, INNER_OF_DOWN  # pyright: ignore[reportReturnType]
        mlp = mlp.shared_experts
    if mlp is not None:
        yield mlp.gate_proj.weight, COLUMNS
        yield mlp.up_proj.weight, COLUMNS
        yield mlp.down_proj.weight, ROWS


def partial_gradients(layer: DecoderLayer) -> Iterator[nn.Parameter]:
    """Whole parameters of `layer` that each process uses for its own heads alone."""
    attention = layer.self_attn
    if isinstance(attention, GQA) and attention.dims.qk_norm:
        yield attention.q_norm.weight
        yield attention.k_norm.weight


def join_activations(layer: DecoderLayer, group: dist.ProcessGroup) -> None:
    """Let `layer`, whose parameters are cut, compute what the whole one would; with MLA, attention
    must be `SharedRows`.
    """
    attention = layer.self_attn
    if isinstance(attention, MLA):
        heads = attention.dims.num_attention_heads // group.size()
        attention.dims = replace(attention.dims, num_attention_heads=heads)
        _queries(attention).register_forward_pre_hook(_copying(group))
    else:
        attention.register_forward_pre_hook(_copying(group))
    attention.o_proj.register_forward_hook(_summing(group))
    mlp = layer.mlp
    mlp.register_forward_hook(_summing(group))
    # The gate computes the same in every process, so it reads what is not copied.
    readers = [mlp.experts, mlp.shared_experts] if isinstance(mlp, MoE) else [mlp]
    for module in readers:
        if module is not None:
            module.register_forward_pre_hook(_copying(group))


@final
class SharedRows(AttentionBackend):
    """Attention of this process's heads: the latent rows, which all heads read, are those of every
    process, so their gradients are summed.
    """

    def __init__(self, inner: AttentionBackend, group: dist.ProcessGroup) -> None:
        self._inner = inner
        self._group = group

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
        entries = copied(entries, self._group)
        return self._inner.mla(layer, q_nope, q_rope, entries, w_uk, w_uv, scale)

    def gqa(
        self,
        layer: int,
        q: Float[Tensor, "tokens heads head_dim"],
        k: Float[Tensor, "tokens kv_heads head_dim"],
        v: Float[Tensor, "tokens kv_heads head_dim"],
        scale: float,
        window: int | None,
    ) -> Float[Tensor, "tokens heads head_dim"]:
        return self._inner.gqa(layer, q, k, v, scale, window)

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "tokens heads head_dim"],
        entries: Float[Tensor, "tokens entry_dim"],
        layout: EntryLayout,
        scale: float,
    ) -> Float[Tensor, "tokens heads head_dim"]:
        raise AssertionError("only MLA and GQA are divided among processes")


def _queries(attention: MLA) -> Linear:
    """The projection that makes queries of every head."""
    return attention.q_proj if attention.dims.q_lora_rank is None else attention.q_b_proj


def _linear(linear: Linear, cut: Cut) -> Iterator[tuple[nn.Parameter, Cut]]:
    yield linear.weight, cut
    if linear.bias is not None:
        yield linear.bias, cut


def _copying(group: dist.ProcessGroup) -> Any:
    def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The first input; with it the factors of a routing, which experts multiply with."""
        x, *rest = inputs
        for place, value in enumerate(rest):
            if isinstance(value, Routing):
                rest[place] = value._replace(weights=copied(value.weights, group))
        return (copied(x, group), *rest)

    return hook


def _summing(group: dist.ProcessGroup) -> Any:
    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return summed(output, group)

    return hook
