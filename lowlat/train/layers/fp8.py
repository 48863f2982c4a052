"""FP8 training (DeepSeek-V3 section 3.3): linear layers and experts whose products run in FP8,
forward and backward, over master weights.

In FP8: every linear layer of attention and MLP, routed and shared experts included. Unchanged:
embedding, head, gate, norms, the attention products, and eh_proj of MTP modules, which released
checkpoints keep in bf16. The products are in `ops.fp8_training`.
"""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lowlat.attention.base import AttentionBackend
from lowlat.model.gla import GLA
from lowlat.model.linear import Linear
from lowlat.model.mla import MLA
from lowlat.model.quant import PLAIN
from lowlat.model.replace_modules import adopt, replace_modules
from lowlat.model.transformer import Transformer
from lowlat.ops.fp8_experts import ExpertFormats, fp8_stacked_experts
from lowlat.ops.fp8_training import (
    SQUARE,
    Fp8Format,
    ScaleFormat,
    fp8_linear,
    fp8_linear_quantized,
    stored_blocks,
)
from lowlat.ops.routing import Routing
from lowlat.train.layers.stacked_experts import Products, StackedExperts
from lowlat.utils.errors import UserError


class Fp8Linear(Linear):
    """Linear whose products run in FP8: a plain weight is the master copy, an fp8 weight is used
    with its stored blocks.
    """

    def __init__(self, linear: Linear, fmt: Fp8Format) -> None:
        adopt(self, linear)
        self.fmt = fmt

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        if self.weight_scale_inv is None:
            return fp8_linear(x, self.weight, self.bias, self.fmt)
        blocks = stored_blocks(self.weight, self.weight_scale_inv)
        return fp8_linear_quantized(x, blocks, self.bias, self.fmt)


class Fp8MLA(MLA):
    """MLA whose keys and values come from an FP8 product with kv_b_proj, attended to as in MHA:
    the expanded attention path, without a KV cache.
    """

    def __init__(self, mla: MLA) -> None:
        adopt(self, mla)

    def attend(
        self,
        q_nope: Float[Tensor, "tokens heads nope_dim"],
        q_rope: Float[Tensor, "tokens heads rope_dim"],
        entries: Float[Tensor, "tokens entry_dim"],
        attention: AttentionBackend,
    ) -> Float[Tensor, "tokens heads v_dim"]:
        dims = self.dims
        latent, k_rope = entries.split([dims.kv_lora_rank, dims.qk_rope_head_dim], dim=-1)
        heads = self.kv_b_proj(latent).unflatten(-1, (dims.num_attention_heads, -1))
        k_nope, v = heads.split([dims.qk_nope_head_dim, dims.v_head_dim], dim=-1)
        k = torch.cat([k_nope, k_rope[:, None].expand_as(q_rope)], dim=-1)
        q = torch.cat([q_nope, q_rope], dim=-1)
        # GQA needs one head width: zero padding adds nothing and is cut off.
        width = max(dims.qk_head_dim, dims.v_head_dim)
        q, k, v = (
            part if part.shape[-1] == width else F.pad(part, (0, width - part.shape[-1]))
            for part in (q, k, v)
        )
        out = attention.gqa(self.layer, q, k, v, self.scale, None)
        return out[..., : dims.v_head_dim]


class Fp8Experts(nn.Module):
    """`StackedExperts` with its products in FP8: the same parameters under the same names."""

    def __init__(self, experts: StackedExperts, formats: ExpertFormats) -> None:
        super().__init__()
        self.gate_up_proj = experts.gate_up_proj
        self.down_proj = experts.down_proj
        self.formats = formats
        self.products: Products = partial(fp8_stacked_experts, formats=formats)

    def forward(
        self, x: Float[Tensor, "tokens hidden"], routing: Routing
    ) -> Float[Tensor, "tokens hidden"]:
        return self.products(x, routing, self.gate_up_proj, self.down_proj)


def use_fp8(model: Transformer, scale_fmt: ScaleFormat = None) -> None:
    """Replace the linear layers, experts and MLA of `model` by modules that compute in FP8, forward
    and backward; its parameters become master weights. Experts must be stacked.

    As in the paper, scales are fp32 except for three kinds of tiles, whose scales are powers of
    two: inputs of o_proj (saved as E5M6 for the backward pass), inputs of the routed experts, and
    gradients before their down-projections. `scale_fmt` "ue8m0" makes all scales powers of two, as
    in the checkpoints of DeepSeek-V3.1.

    kv_b_proj of GLA stays in bf16, because the attention backend uses its weight. Raises UserError
    for weights that are packed, or fp8 in blocks of another size.
    """
    spared = {module.kv_b_proj for module in model.modules() if isinstance(module, GLA)}
    for name, module in model.named_modules():
        if isinstance(module, Linear) and module not in spared:
            _check(name, module)

    def in_fp8(path: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, StackedExperts):
            return Fp8Experts(module, expert_formats(scale_fmt))
        if isinstance(module, Linear) and module not in spared:
            fmt = _format(path.split("."), scale_fmt)
            return None if fmt is None else Fp8Linear(module, fmt)
        return Fp8MLA(module) if isinstance(module, MLA) else None

    replace_modules(model, in_fp8)


def expert_formats(scale_fmt: ScaleFormat) -> ExpertFormats:
    """FP8 formats of routed experts: tensors sent between devices have power-of-two scales."""
    base = _base(scale_fmt)
    return ExpertFormats(
        up=replace(base, input_scales="ue8m0"), down=replace(base, gradient_scales="ue8m0")
    )


def _check(name: str, linear: Linear) -> None:
    if linear.storage not in ("plain", "fp8") or linear.block not in (None, SQUARE):
        kind = linear.storage if linear.block is None else f"fp8 in blocks of {linear.block}"
        raise UserError(f"{name} is {kind}; load the model with --dtype fp32 to compute in FP8")


def _format(path: list[str], scale_fmt: ScaleFormat) -> Fp8Format | None:
    """FP8 format of the layer at `path`; None for layers that are not quantized."""
    if path[-1] in PLAIN:
        return None
    if path[-1] == "o_proj":
        return replace(_base(scale_fmt), input_scales="ue8m0", saved_input="e5m6")
    if "experts" in path:
        formats = expert_formats(scale_fmt)
        return formats.down if path[-1] == "down_proj" else formats.up
    return _base(scale_fmt)


def _base(scale_fmt: ScaleFormat) -> Fp8Format:
    return Fp8Format(weight_scales=scale_fmt, input_scales=scale_fmt, gradient_scales=scale_fmt)
