"""Tensor and expert parallelism: keep this process's part of a model's heads, rows and experts."""

from dataclasses import replace

from torch import nn

from lowlat.config.attention import AttentionConfig
from lowlat.config.model import GQAConfig, MLAConfig
from lowlat.model.block import DecoderLayer
from lowlat.model.gqa import GQA
from lowlat.model.linear import Linear
from lowlat.model.mla import MLA
from lowlat.model.moe import MLP, Experts, MoE
from lowlat.model.share import ModelShare, RemoteModule
from lowlat.utils.errors import UserError


def divide_layer(layer: DecoderLayer, share: ModelShare) -> None:
    """Keep the part of a decoder layer that `share` has. Raises UserError for sizes that it does
    not divide."""
    if share.tensor > 1:
        _divide_attention(layer.self_attn, share)
    mlp = layer.mlp
    if not isinstance(mlp, MoE):
        assert isinstance(mlp, MLP)
        return divide_mlp(mlp, share)
    if mlp.shared_experts is not None:
        divide_mlp(mlp.shared_experts, share)
    experts = mlp.experts
    assert isinstance(experts, Experts)
    experts.parts, experts.rank = share.experts, share.expert_rank
    experts.places = share.expert_places(len(experts))
    for number in set(range(len(experts))).difference(experts.own):
        experts[number] = RemoteModule()


def divide_mlp(mlp: MLP, share: ModelShare) -> None:
    """Keep a part of the rows of each projection."""
    for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        divide_rows(linear, share)


def divide_rows(linear: Linear, share: ModelShare) -> None:
    """Keep a part of the rows of a projection."""
    if share.tensor > 1:
        linear.keep_part(share.tensor_rank, share.tensor)


def part_of(attention: AttentionConfig, share: ModelShare) -> AttentionConfig:
    """`attention` with the heads of `share`. Raises UserError if they cannot be divided."""
    if share.tensor == 1:
        return attention
    size, heads = share.tensor, attention.num_attention_heads
    if not isinstance(attention, MLAConfig | GQAConfig):
        raise UserError(f"tensor={size}: only MLA, MHA, GQA and MQA are divided by heads")
    if isinstance(attention, MLAConfig) and attention.attn_output_gate:
        raise UserError(f"tensor={size}: attention with attn_output_gate is not divided by heads")
    counts = {"num_attention_heads": heads}
    if isinstance(attention, GQAConfig):
        counts["num_key_value_heads"] = attention.num_key_value_heads
    for name, count in counts.items():
        if count % size:
            raise UserError(f"tensor={size} does not divide the model's {name} {count}")
    return replace(attention, **{name: count // size for name, count in counts.items()})


def _divide_attention(attention: nn.Module, share: ModelShare) -> None:
    if not isinstance(attention, MLA | GQA):
        raise UserError(f"tensor={share.tensor}: only MLA, MHA, GQA and MQA are divided by heads")
    dims = part_of(attention.dims, share)
    if isinstance(attention, MLA):
        q = attention.q_proj if attention.dims.q_lora_rank is None else attention.q_b_proj
        projections = [q, attention.kv_b_proj, attention.o_proj]
    else:
        projections = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    for linear in projections:
        divide_rows(linear, share)
    attention.dims = dims  # pyright: ignore[reportAttributeAccessIssue]
