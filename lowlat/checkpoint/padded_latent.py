"""Padded latents of exactly converted models: a constant channel makes RMSNorm the identity.

A standard deepseek_v3 checkpoint normalizes the latent; an exactly converted model must not. So its
files hold a wider latent: R = padded_rank(r) = 64 * ceil(r / 63) channels, of which the first r are
real, the last R / 64 are the constant m = 2^15 (put there by a bias), and the rest zero. The mean
of squares is then m^2 / 64 up to |c|^2 / m^2. The norm divides by m / 8, and norm weights of m / 8
= 2^12 restore the latent. All numbers are powers of two: exact in fp32, bf16 and fp16.

    kv_a_proj_with_mqa.weight   rows [0, r) real, [r, R) zero, then the d_R rotary rows
    kv_a_proj_with_mqa.bias     [0, r) real or zero, zeros, m in [R - R/64, R), d_R real or zero
    kv_a_layernorm.weight       2^12 everywhere
    kv_b_proj.weight            columns [r, R) zero
    o_proj.bias                 real or zero (the layout's attention_bias demands one)

The layout has query biases only for low-rank queries. So queries with a bias pass through an
identity of the same kind with Q = padded_rank(hidden_size) rows:

    q_a_proj.weight             rows [0, hidden) the identity, the rest zero
    q_a_proj.bias               m in the last Q / 64 rows, the rest zero
    q_a_layernorm.weight        2^12, but 2^-3 in the last Q / 64, so that m / (m/8) * 2^-3 = 1
    q_b_proj.weight             columns [0, hidden) W_q, column Q - Q/64 the bias b_q, the rest zero

The model itself has r channels, no kv_a_layernorm, and q_proj.weight with q_proj.bias. Owns the
tensors of one layer; `mapping` decides which layers need this.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Shaped
from torch import Tensor

from lowlat.config.hf.padded_latent import padded_rank
from lowlat.config.model import MLAConfig
from lowlat.utils.errors import UserError

CONSTANT = 2.0**15
"""m: the value of the constant channels before the norm."""
NORM_WEIGHT = CONSTANT / 8
"""Norm weight of channels the norm must leave alone."""
UNIT_WEIGHT = 0.125
"""Norm weight of constant channels that must come out as one."""


class PaddingError(UserError):
    """A tensor without the padding above; the message names the tensor, not the file."""


def pad_latent(tensors: Mapping[str, Tensor], attention: MLAConfig) -> dict[str, Tensor]:
    """One layer's self_attn tensors (`kv_a_proj_with_mqa.weight`, ...) from the model's to the
    files' layout.
    """
    rank = attention.kv_lora_rank
    joint = tensors["kv_a_proj_with_mqa.weight"]
    bias = tensors.get("kv_a_proj_with_mqa.bias", joint.new_zeros(len(joint)))
    result = {
        "kv_a_proj_with_mqa.weight": pad_rows(joint, rank),
        "kv_a_proj_with_mqa.bias": pad_bias(bias, rank),
        "kv_a_layernorm.weight": joint.new_full((padded_rank(rank),), NORM_WEIGHT),
        "kv_b_proj.weight": pad_columns(tensors["kv_b_proj.weight"], rank),
        "o_proj.weight": tensors["o_proj.weight"],
    }
    result["o_proj.bias"] = tensors.get(
        "o_proj.bias", joint.new_zeros(len(tensors["o_proj.weight"]))
    )
    if not attention.q_bias:
        return result | {"q_proj.weight": tensors["q_proj.weight"]}
    return result | pad_queries(tensors["q_proj.weight"], tensors["q_proj.bias"])


def unpad_latent(
    tensors: Mapping[str, Tensor], attention: MLAConfig, prefix: str = ""
) -> dict[str, Tensor]:
    """The reverse of `pad_latent`.

    Raises PaddingError naming `prefix` + tensor where constants or zeros are not in place.
    """
    rank = attention.kv_lora_rank
    joint_bias, o_bias = f"{prefix}kv_a_proj_with_mqa.bias", f"{prefix}o_proj.bias"
    check_norm(tensors["kv_a_layernorm.weight"], f"{prefix}kv_a_layernorm.weight")
    joint = tensors["kv_a_proj_with_mqa.weight"]
    up = tensors["kv_b_proj.weight"]
    result = {
        "kv_a_proj_with_mqa.weight": unpad_rows(joint, rank, f"{prefix}kv_a_proj_with_mqa.weight"),
        "kv_b_proj.weight": unpad_columns(up, rank, f"{prefix}kv_b_proj.weight"),
        "o_proj.weight": tensors["o_proj.weight"],
    }
    bias = unpad_bias(tensors["kv_a_proj_with_mqa.bias"], rank, joint_bias)
    if attention.attention_bias:
        result["kv_a_proj_with_mqa.bias"] = bias
    else:
        check_zero(bias, joint_bias)
    if attention.attention_bias or attention.o_bias:
        result["o_proj.bias"] = tensors["o_proj.bias"]
    else:
        check_zero(tensors["o_proj.bias"], o_bias)
    if not attention.q_bias:
        return result | {"q_proj.weight": tensors["q_proj.weight"]}
    weight, bias = unpad_queries(tensors, prefix)
    return result | {"q_proj.weight": weight, "q_proj.bias": bias}


def pad_rows(
    joint: Shaped[Tensor, "rows hidden"], rank: int
) -> Shaped[Tensor, "padded_rows hidden"]:
    """kv_a_proj_with_mqa.weight [r + d_R, hidden] -> [R + d_R, hidden]: zero rows after the
    latent's.
    """
    filler = joint.new_zeros(padded_rank(rank) - rank, joint.shape[1])
    return torch.cat([joint[:rank], filler, joint[rank:]])


def unpad_rows(
    joint: Shaped[Tensor, "padded_rows hidden"], rank: int, name: str
) -> Shaped[Tensor, "rows hidden"]:
    """The reverse of `pad_rows`. Raises PaddingError where the padding is not zero."""
    check_zero(joint[rank : padded_rank(rank)], name)
    return torch.cat([joint[:rank], joint[padded_rank(rank) :]])


def pad_bias(bias: Shaped[Tensor, " rows"], rank: int) -> Shaped[Tensor, " padded_rows"]:
    """kv_a_proj_with_mqa.bias [r + d_R] -> [R + d_R], the constant in the last R / 64 latent
    channels.
    """
    return torch.cat([bias[:rank], _constants(bias, rank), bias[rank:]])


def unpad_bias(
    bias: Shaped[Tensor, " padded_rows"], rank: int, name: str
) -> Shaped[Tensor, " rows"]:
    """The reverse of `pad_bias`. Raises PaddingError where zeros or constants are not in place."""
    padding = bias[rank : padded_rank(rank)]
    if not torch.equal(padding, _constants(bias, rank)):
        raise PaddingError(_violation(name, f"its padding must be zeros, then {CONSTANT:g}"))
    return torch.cat([bias[:rank], bias[padded_rank(rank) :]])


def pad_columns(weight: Shaped[Tensor, "out rank"], rank: int) -> Shaped[Tensor, "out padded_rank"]:
    """kv_b_proj.weight [out, r] -> [out, R]: nothing reads the padding."""
    return torch.cat([weight, weight.new_zeros(len(weight), padded_rank(rank) - rank)], dim=1)


def unpad_columns(
    weight: Shaped[Tensor, "out padded_rank"], rank: int, name: str
) -> Shaped[Tensor, "out rank"]:
    """The reverse of `pad_columns`. Raises PaddingError where the padding is not zero."""
    check_zero(weight[:, rank:], name)
    return weight[:, :rank].contiguous()


def pad_queries(
    weight: Shaped[Tensor, "out hidden"], bias: Shaped[Tensor, " out"]
) -> dict[str, Tensor]:
    """q_proj.weight and q_proj.bias as q_a_proj (weight, bias), q_a_layernorm and q_b_proj."""
    hidden = weight.shape[1]
    columns = bias.new_zeros(len(bias), padded_rank(hidden) - hidden)
    columns[:, -_constant_channels(hidden)] = bias
    return _identity_down(weight, hidden) | {"q_b_proj.weight": torch.cat([weight, columns], dim=1)}


def unpad_queries(
    tensors: Mapping[str, Tensor], prefix: str = ""
) -> tuple[Shaped[Tensor, "out hidden"], Shaped[Tensor, " out"]]:
    """The reverse of `pad_queries`. Raises PaddingError naming a tensor without that padding."""
    down, up = tensors["q_a_proj.weight"], tensors["q_b_proj.weight"]
    hidden = down.shape[1]
    for name, expected in _identity_down(down, hidden).items():
        if not torch.equal(tensors[name], expected):
            raise PaddingError(
                _violation(prefix + name, "it must pass the hidden state on unchanged")
            )
    bias = up[:, -_constant_channels(hidden)].clone()
    padding = up[:, hidden:].clone()
    padding[:, -_constant_channels(hidden)] = 0
    check_zero(padding, f"{prefix}q_b_proj.weight")
    return up[:, :hidden].contiguous(), bias


def check_norm(weight: Shaped[Tensor, " channels"], name: str) -> None:
    """PaddingError unless all of `weight` is the constant that makes the norm the identity."""
    if not bool((weight == NORM_WEIGHT).all()):
        raise PaddingError(_violation(name, f"it must be {NORM_WEIGHT:g} everywhere"))


def check_zero(tensor: Tensor, name: str) -> None:
    """PaddingError unless all of `tensor`, a part of the tensor `name`, is zero."""
    if bool((tensor != 0).any()):
        raise PaddingError(_violation(name, "its padding must be zero"))


def _constant_channels(width: int) -> int:
    return padded_rank(width) // 64


def _constants(like: Tensor, width: int) -> Tensor:
    """Bias values of the channels added to `width`: zeros, then the constants."""
    padding = like.new_zeros(padded_rank(width) - width)
    padding[-_constant_channels(width) :] = CONSTANT
    return padding


def _identity_down(like: Tensor, hidden: int) -> dict[str, Tensor]:
    """The query down-projection and norm that pass `hidden` channels on and append ones."""
    width, constants = padded_rank(hidden), _constant_channels(hidden)
    identity = like.new_zeros(width, hidden)
    identity.fill_diagonal_(1)
    norm = like.new_full((width,), NORM_WEIGHT)
    norm[-constants:] = UNIT_WEIGHT
    bias = torch.cat([like.new_zeros(hidden), _constants(like, hidden)])
    return {"q_a_proj.weight": identity, "q_a_proj.bias": bias, "q_a_layernorm.weight": norm}


def _violation(name: str, rule: str) -> str:
    return f"tensor {name!r}: {rule} in an exactly converted model; convert the original again"
