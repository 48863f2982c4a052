"""Autograd functions of RMSNorm, SwiGLU, RoPE and causal attention with fused backward passes: they
save few tensors and read each row once. On the CPU in bf16 and fp32 the native kernels compute
them.
"""

from typing import Any

import torch
from jaxtyping import BFloat16, Float, Float32, Int
from torch import Tensor

from lowlat.ops import experts, native_training_kernels
from lowlat.ops.norm import accumulation_dtype


def rms_norm(
    x: Float[Tensor, "*rows dim"], weight: Float[Tensor, "dim"], eps: float
) -> Float[Tensor, "*rows dim"]:
    """`norm.rms_norm`; saves x and one number per row."""
    out = _RMSNorm.apply(x.reshape(-1, x.shape[-1]), weight, eps)
    assert isinstance(out, Tensor)
    # FSDP2 warns of modules whose output is a view.
    return out if x.dim() == 2 else out.view(x.shape)


def swiglu(
    gate: Float[Tensor, "*rows inner"], up: Float[Tensor, "*rows inner"]
) -> Float[Tensor, "*rows inner"]:
    """`experts.swiglu`; saves gate and up."""
    out = _SwiGLU.apply(gate.flatten(0, -2), up.flatten(0, -2))
    assert isinstance(out, Tensor)
    return out.view(gate.shape)


def causal_attention(
    q: BFloat16[Tensor, "tokens heads key_dim"],
    k: BFloat16[Tensor, "tokens kv_heads key_dim"],
    v: BFloat16[Tensor, "tokens kv_heads value_dim"],
    ends: Int[Tensor, "sequences"],
    scale: float,
) -> BFloat16[Tensor, "tokens heads value_dim"]:
    """Causal attention within packed sequences that end at `ends`, by the native kernels, which
    must be usable. Saves inputs, output and one number per query and head.
    """
    out = _CausalAttention.apply(q, k, v, ends, scale)
    assert isinstance(out, Tensor)
    return out


def rotate(
    x: Float[Tensor, "tokens heads dim"],
    cos: Float32[Tensor, "tokens pairs"],
    sin: Float32[Tensor, "tokens pairs"],
    *,
    interleave: bool,
) -> Float[Tensor, "tokens heads dim"]:
    """`rope.apply_rope` by the native kernels, which must be usable; saves the tables only."""
    out = _Rotation.apply(x, cos, sin, interleave)
    assert isinstance(out, Tensor)
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        wide = accumulation_dtype(x.dtype)
        if native_training_kernels.usable(x):
            out, inverse = native_training_kernels.norm_forward(
                x, weight.to(wide).contiguous(), eps
            )
        else:
            inverse = torch.rsqrt(x.to(wide).square().mean(dim=-1) + eps)
            out = (x.to(wide) * inverse[:, None] * weight.to(wide)).to(x.dtype)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        wide = accumulation_dtype(x.dtype)
        grad = grad.contiguous()
        if native_training_kernels.usable(x, grad):
            given = weight.to(wide).contiguous()
            grad_x, grad_weight = native_training_kernels.norm_backward(x, given, inverse, grad)
            return grad_x, grad_weight.to(weight.dtype), None
        normal = x.to(wide) * inverse[:, None]
        grad_weight = (grad.to(wide) * normal).sum(dim=0)
        along = grad.to(wide) * weight.to(wide)
        back = normal * (along * normal).mean(dim=-1, keepdim=True)
        grad_x = (along - back) * inverse[:, None]
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        if native_training_kernels.usable(gate, up):
            return native_training_kernels.gated_forward(gate, up)
        return experts.swiglu(gate, up)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if native_training_kernels.usable(gate, grad):
            return native_training_kernels.gated_gradients(gate, up, grad.contiguous())
        _, grad_gate_up, _ = gated_backward(torch.cat([gate, up], dim=1), grad.contiguous(), None)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=1)
        return grad_gate, grad_up


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleave: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleave = interleave
        return native_training_kernels.rotation(x, cos, sin, interleave=interleave)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None, None, None]:
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        cos, sin = ctx.saved_tensors
        back = native_training_kernels.rotation(
            grad, cos, sin, interleave=ctx.interleave, is_inverse=True
        )
        return back, None, None, None


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, scale: float) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, logs = native_training_kernels.causal_forward(q, k, v, ends, scale)
        ctx.save_for_backward(q, k, v, ends, out, logs)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, ends, out, logs = ctx.saved_tensors
        grads = native_training_kernels.causal_backward(
            q, k, v, ends, ctx.scale, out, logs, grad.contiguous()
        )
        return *grads, None, None


def gated_backward(
    gate_up: Float[Tensor, "rows inner_twice"],
    grad: Float[Tensor, "rows inner"],
    factors: Float[Tensor, "rows"] | None,
) -> tuple[
    Float[Tensor, "rows inner"], Float[Tensor, "rows inner_twice"], Float[Tensor, "rows"] | None
]:
    """Backward pass of factors * W (silu(gate) * up), given grad = W^T dy: the recomputed inner
    activation, the gradient of gate_up, and that of the factors, from <dy, W h> = <W^T dy, h>.
    """
    if native_training_kernels.usable(gate_up, grad):
        return native_training_kernels.gated_backward(gate_up, grad, factors)
    wide = accumulation_dtype(gate_up.dtype)
    gate, up = gate_up.to(wide).chunk(2, dim=1)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    inner = (silu * up).to(gate_up.dtype)
    plain = grad.to(wide)
    scaled = plain if factors is None else plain * factors[:, None]
    grad_up = scaled * silu
    grad_gate = scaled * up * (sigmoid + silu * (1 - sigmoid))
    grad_gate_up = torch.cat([grad_gate, grad_up], dim=1).to(gate_up.dtype)
    grad_factors = None if factors is None else (plain * inner).sum(dim=1)
    return inner, grad_gate_up, grad_factors
