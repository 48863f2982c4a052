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

from collections.abc import Callable, Mapping

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
    """The self_attn tensors of a layer, from the model's layout to that of files."""
    rank = attention.kv_lora_rank
    joint, output = tensors["kv_a_proj_with_mqa.weight"], tensors["o_proj.weight"]
    bias = tensors.get("kv_a_proj_with_mqa.bias", joint.new_zeros(len(joint)))
    result = {
        "kv_a_proj_with_mqa.weight": pad_rows(joint, rank),
        "kv_a_proj_with_mqa.bias": pad_bias(bias, rank),
        "kv_a_layernorm.weight": joint.new_full((padded_rank(rank),), NORM_WEIGHT),
        "kv_b_proj.weight": pad_columns(tensors["kv_b_proj.weight"], rank),
        "o_proj.weight": output,
        "o_proj.bias": tensors.get("o_proj.bias", joint.new_zeros(len(output))),
    }
    queries = tensors["q_proj.weight"]
    if not attention.q_bias:
        return result | {"q_proj.weight": queries}
    hidden, bias = queries.shape[1], tensors["q_proj.bias"]
    columns = bias.new_zeros(len(bias), padded_rank(hidden) - hidden)
    columns[:, -_constant_channels(hidden)] = bias
    up = torch.cat([queries, columns], dim=1)
    return result | _identity_down(queries, hidden) | {"q_b_proj.weight": up}


def unpad_latent(
    read: Callable[[str], Tensor], attention: MLAConfig, prefix: str = ""
) -> dict[str, Tensor]:
    """The reverse of `pad_latent`; `read` returns a tensor of the file by its name in self_attn.

    Raises PaddingError naming `prefix` + tensor where constants or zeros are not in place.
    """
    rank, width = attention.kv_lora_rank, padded_rank(attention.kv_lora_rank)
    joint, bias = read("kv_a_proj_with_mqa.weight"), read("kv_a_proj_with_mqa.bias")
    norm, up = read("kv_a_layernorm.weight"), read("kv_b_proj.weight")
    output, output_bias = read("o_proj.weight"), read("o_proj.bias")
    has_norm = bool((norm == NORM_WEIGHT).all())
    _require(has_norm, f"{prefix}kv_a_layernorm.weight", f"it must be {NORM_WEIGHT:g} everywhere")
    _require_zero(joint[rank:width], f"{prefix}kv_a_proj_with_mqa.weight")
    _require_zero(up[:, rank:], f"{prefix}kv_b_proj.weight")
    has_constants = torch.equal(bias[rank:width], _constants(bias, rank))
    rule = f"its padding must be zeros, then {CONSTANT:g}"
    _require(has_constants, f"{prefix}kv_a_proj_with_mqa.bias", rule)
    result = {
        "kv_a_proj_with_mqa.weight": torch.cat([joint[:rank], joint[width:]]),
        "kv_b_proj.weight": up[:, :rank].contiguous(),
        "o_proj.weight": output,
    }
    own_bias = torch.cat([bias[:rank], bias[width:]])
    if attention.attention_bias:
        result["kv_a_proj_with_mqa.bias"] = own_bias
    else:
        _require_zero(own_bias, f"{prefix}kv_a_proj_with_mqa.bias")
    if attention.attention_bias or attention.o_bias:
        result["o_proj.bias"] = output_bias
    else:
        _require_zero(output_bias, f"{prefix}o_proj.bias")
    if not attention.q_bias:
        return result | {"q_proj.weight": read("q_proj.weight")}
    return result | _unpadded_queries(read, prefix)


def _unpadded_queries(read: Callable[[str], Tensor], prefix: str) -> dict[str, Tensor]:
    """q_proj from q_a_proj, q_a_layernorm and q_b_proj, which must pass the hidden state on."""
    names = ("q_a_proj.weight", "q_a_proj.bias", "q_a_layernorm.weight")
    down = {name: read(name) for name in names}
    hidden = down["q_a_proj.weight"].shape[1]
    for name, expected in _identity_down(down["q_a_proj.weight"], hidden).items():
        is_identity = torch.equal(down[name], expected)
        _require(is_identity, prefix + name, "it must pass the hidden state on unchanged")
    up, constant = read("q_b_proj.weight"), -_constant_channels(hidden)
    padding = up[:, hidden:].clone()
    padding[:, constant] = 0
    _require_zero(padding, f"{prefix}q_b_proj.weight")
    return {
        "q_proj.weight": up[:, :hidden].contiguous(),
        "q_proj.bias": up[:, constant].clone(),
    }


def pad_rows(
    joint: Shaped[Tensor, "rows hidden"], rank: int
) -> Shaped[Tensor, "padded_rows hidden"]:
    """kv_a_proj_with_mqa.weight [r + d_R, hidden] -> [R + d_R, hidden]: zero rows inserted."""
    filler = joint.new_zeros(padded_rank(rank) - rank, joint.shape[1])
    return torch.cat([joint[:rank], filler, joint[rank:]])


def pad_bias(bias: Shaped[Tensor, " rows"], rank: int) -> Shaped[Tensor, " padded_rows"]:
    """kv_a_proj_with_mqa.bias [r + d_R] -> [R + d_R], constants as the last R / 64 of R."""
    return torch.cat([bias[:rank], _constants(bias, rank), bias[rank:]])


def pad_columns(weight: Shaped[Tensor, "out rank"], rank: int) -> Shaped[Tensor, "out padded_rank"]:
    """kv_b_proj.weight [out, r] -> [out, R]: nothing reads the padding."""
    return torch.cat([weight, weight.new_zeros(len(weight), padded_rank(rank) - rank)], dim=1)


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


def _require_zero(padding: Tensor, name: str) -> None:
    _require(bool((padding == 0).all()), name, "its padding must be zero")


def _require(holds: bool, name: str, rule: str) -> None:
    if not holds:
        raise PaddingError(
            f"tensor {name!r}: {rule} in an exactly converted model; convert the original again"
        )
