"""Heads and parts of a weight: which rows (or columns) belong to which head, and what they are."""

import re
from typing import NamedTuple

from lowlat.config.model import GQAConfig, MLAConfig, ModelConfig


class Part(NamedTuple):
    """Adjacent rows of every head with one purpose."""

    name: str
    """'RoPE', 'k', 'v', ...; empty if the head has one part."""
    size: int
    rotates: bool = False
    """Whether RoPE pairs these channels."""


class HeadLayout(NamedTuple):
    """Division of one axis of a weight into heads, and of a head into parts."""

    axis: int
    heads: int
    parts: tuple[Part, ...]
    unit: str = "head"
    """Word for what is counted; empty for a single one."""

    @property
    def size(self) -> int:
        """Rows of a head."""
        return sum(part.size for part in self.parts)

    @property
    def rows(self) -> str:
        return "columns" if self.axis else "rows"


_LAYER = re.compile(r"model\.layers\.(\d+)\.(?:self_attn\.)?(.+)\.(weight|bias)")


def head_layout(config: ModelConfig, name: str, shape: tuple[int, ...]) -> HeadLayout | None:
    """The layout of the weight with Hugging Face name `name`; None if it has no heads."""
    found = _LAYER.fullmatch(name)
    if found is None:
        return None
    layer, module, kind = int(found[1]), found[2], found[3]
    attention = config.attention_of(layer)
    layout: HeadLayout | None = None
    if module == "mlp.gate" and config.moe is not None and len(shape) == 2:
        layout = HeadLayout(0, config.moe.n_routed_experts, (Part("", 1),), "expert")
    elif isinstance(attention, MLAConfig):
        layout = _mla(attention, module, kind)
    elif isinstance(attention, GQAConfig):
        layout = _gqa(attention, module, kind)
    if layout is None or layout.axis >= len(shape):
        return None
    return layout if layout.heads * layout.size == shape[layout.axis] else None


def _mla(mla: MLAConfig, module: str, kind: str) -> HeadLayout | None:
    heads, rope = mla.num_attention_heads, Part("RoPE", mla.qk_rope_head_dim, rotates=True)
    nope, v = mla.qk_nope_head_dim, mla.v_head_dim
    match module:
        case "q_proj" | "q_b_proj":
            return _layout(0, heads, Part("NoPE", nope), rope)
        case "kv_b_proj":
            return _layout(0, heads, Part("k", nope), Part("v", v))
        case "kv_a_proj_with_mqa":
            latent = Part("latent", mla.kv_lora_rank)
            return _layout(0, 1, latent, rope)._replace(unit="")
        case "o_proj" if kind == "weight":
            return _layout(1, heads, Part("", v))
    return None


def _gqa(gqa: GQAConfig, module: str, kind: str) -> HeadLayout | None:
    rope = Part("RoPE", gqa.head_dim, rotates=True)
    match module:
        case "q_proj":
            return _layout(0, gqa.num_attention_heads, rope)
        case "k_proj":
            return _layout(0, gqa.num_key_value_heads, rope)
        case "v_proj":
            return _layout(0, gqa.num_key_value_heads, Part("", gqa.head_dim))
        case "q_norm" | "k_norm":
            return _layout(0, 1, rope)._replace(unit="")
        case "o_proj" if kind == "weight":
            return _layout(1, gqa.num_attention_heads, Part("", gqa.head_dim))
    return None


def _layout(axis: int, heads: int, *parts: Part) -> HeadLayout:
    return HeadLayout(axis, heads, tuple(part for part in parts if part.size))
