"""Tensor parallelism: heads and MLP channels divided among processes that have the same tokens
(Megatron-LM, arXiv 1909.08053 section 3).

Column-parallel and row-parallel matrices, and the hooks that copy inputs and all-reduce outputs.
MLA's latent projections, gates, norms, embedding and head are replicated, and so are the residual
stream and the loss: there is no sequence parallelism in Megatron's sense. `context` divides
sequences.
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
from lowlat.ops.routing import Routing
from lowlat.train.parallel.collectives import copy_to_group, reduce_from_group
from lowlat.train.parallel.sharding import Shard
from lowlat.utils.errors import UserError

AXIS = "tensor"
COLUMNS = Shard(axis=AXIS, dim=0)
"""Output channels of a projection."""
ROWS = Shard(axis=AXIS, dim=1)
"""Input channels of a projection."""
INNER_OF_GATE_UP = Shard(axis=AXIS, dim=1, blocks=2)
INNER_OF_DOWN = Shard(axis=AXIS, dim=2)


def check_divisible(config: ModelConfig, size: int, origin: str) -> None:
    """Raises UserError if `size` processes cannot divide a model of `config`."""
    where = f"{origin}: parallel.tensor {size}"
    sizes = [
        ("num_attention_heads", config.num_attention_heads),
        ("intermediate_size", config.intermediate_size),
    ]
    for layer in distinct(config.attention):
        if not isinstance(layer, MLAConfig | GQAConfig):
            raise UserError(f"{where}: only MLA and GQA support it; leave it at 1")
        if isinstance(layer, MLAConfig) and layer.attn_output_gate:
            raise UserError(f"{where}: attn_output_gate does not support it; leave it at 1")
        if layer.o_bias or (isinstance(layer, MLAConfig) and layer.attention_bias):
            raise UserError(f"{where}: o_proj with a bias does not support it; leave it at 1")
        if isinstance(layer, GQAConfig):
            sizes.append(("num_key_value_heads", layer.num_key_value_heads))
    if config.moe is not None:
        sizes.append(("moe_intermediate_size", config.moe.moe_intermediate_size))
    for field, count in sizes:
        if count % size:
            raise UserError(f"{where} does not divide {field} {count}; choose one that does")


def shards(layer: DecoderLayer) -> Iterator[tuple[nn.Parameter, Shard]]:
    """The sharded parameters of `layer` with their placements; all others are replicated."""
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
    """Replicated parameters of `layer` that each process uses for its own heads only: their
    gradients are summed.
    """
    attention = layer.self_attn
    if isinstance(attention, GQA) and attention.dims.qk_norm:
        yield attention.q_norm.weight
        yield attention.k_norm.weight


def join_activations(layer: DecoderLayer, group: dist.ProcessGroup) -> None:
    """Make `layer`, whose parameters are sharded, compute the output of the full layer; MLA needs
    the attention backend `TensorParallelAttention`.
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
    # The gate computes the same in every process, so its input is not copied.
    readers = [mlp.experts, mlp.shared_experts] if isinstance(mlp, MoE) else [mlp]
    for module in readers:
        if module is not None:
            module.register_forward_pre_hook(_copying(group))


@final
class TensorParallelAttention(AttentionBackend):
    """Attention over this process's heads. All heads read the latent KV entries, so the gradients
    of the entries are summed over processes.
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
        entries = copy_to_group(entries, self._group)
        return self._inner.mla(layer, q_nope, q_rope, entries, w_uk, w_uv, scale)

    def sparse_mla(self, *arguments: Any, **named: Any) -> Tensor:
        raise AssertionError("IndexedAttention trains sparse attention")

    def gqa(self, *arguments: Any, **named: Any) -> Tensor:
        return self._inner.gqa(*arguments, **named)

    def attend(self, *arguments: Any, **named: Any) -> Tensor:
        raise AssertionError("tensor parallelism supports MLA and GQA only")


def _queries(attention: MLA) -> Linear:
    """The column-parallel query projection."""
    return attention.q_proj if attention.dims.q_lora_rank is None else attention.q_b_proj


def _linear(linear: Linear, shard: Shard) -> Iterator[tuple[nn.Parameter, Shard]]:
    yield linear.weight, shard
    if linear.bias is not None:
        yield linear.bias, shard


def _copying(group: dist.ProcessGroup) -> Any:
    def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Copies the first input and the weights of a routing, which experts multiply with."""
        x, *rest = inputs
        for place, value in enumerate(rest):
            if isinstance(value, Routing):
                rest[place] = value._replace(weights=copy_to_group(value.weights, group))
        return (copy_to_group(x, group), *rest)

    return hook


def _summing(group: dist.ProcessGroup) -> Any:
    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return reduce_from_group(output, group)

    return hook
