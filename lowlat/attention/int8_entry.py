"""KV cache quantization: int8 KV cache entry, the bytes of one token in one layer
(per-token scales).

    [0, n)        n channels as int8: the latents of MLA and GLA, the tied states of GTA, the whole
                  entry of MHA, GQA, MQA, TPA, and of MLA that was converted from GQA
    [n, m)        zeros up to m, the next multiple of 4
    [m, m + 4 g)  g = ceil(n / 64) fp32 scales, one for each 64 channels: max |x| / 127
    [m + 4 g, ..) the other channels in bf16: k_R

value = scale * q with q = x / scale to nearest even. The RoPE width is even, so entries are whole
multiples of 4 bytes. The native implementation is csrc/kernels/kv_cache.h.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from lowlat.config.kv_cache_size import SCALE_CHANNELS, EntrySize
from lowlat.config.model import AttentionConfig
from lowlat.utils.device import dtype_name

INT8_MAX = 127


def entry_bytes(attention: AttentionConfig, dtype: torch.dtype) -> int:
    """Bytes of an entry in a cache of `dtype`."""
    return EntrySize.of(attention).num_bytes(dtype_name(dtype))


def pack_entries(
    entries: Float[Tensor, "tokens entry_dim"], quantized: int, group: int = SCALE_CHANNELS
) -> UInt8[Tensor, "tokens entry_bytes"]:
    """The bytes of `entries`, their first `quantized` channels in int8 with a scale per `group`."""
    wide = entries[:, :quantized].to(torch.float32)
    groups = F.pad(wide, (0, -quantized % group)).unflatten(1, (-1, group))
    scale = groups.abs().amax(dim=-1) / INT8_MAX
    divisor = torch.where(scale == 0, 1.0, scale)[..., None]
    values = (groups / divisor).round().to(torch.int8).flatten(1)[:, :quantized]
    values = F.pad(values, (0, _padded(quantized) - quantized))
    plain = entries[:, quantized:].to(torch.bfloat16).contiguous()
    return torch.cat([part.view(torch.uint8) for part in (values, scale, plain)], dim=1)


def unpack_entries(
    packed: UInt8[Tensor, "tokens entry_bytes"],
    entry_dim: int,
    quantized: int,
    dtype: torch.dtype,
    group: int = SCALE_CHANNELS,
) -> Float[Tensor, "tokens entry_dim"]:
    """The inverse of `pack_entries`: multiplied in fp32, rounded once to `dtype`."""
    scales_at, count = _padded(quantized), -(-quantized // group)
    values = packed[:, :quantized].view(torch.int8).to(torch.float32)
    scale = packed[:, scales_at : scales_at + 4 * count].contiguous().view(torch.float32)
    scale = scale.repeat_interleave(group, dim=1)[:, :quantized]
    plain = packed[:, scales_at + 4 * count :].contiguous().view(torch.bfloat16)
    assert plain.shape[1] == entry_dim - quantized
    return torch.cat([(values * scale).to(dtype), plain.to(dtype)], dim=1)


def _padded(quantized: int) -> int:
    return -(-quantized // 4) * 4
