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

from lowlat.config.attention import index_key_dim
from lowlat.config.kv_cache_size import SCALE_CHANNELS, int8_entry_bytes
from lowlat.config.model import AttentionConfig

INT8_MAX = 127


def entry_bytes(attention: AttentionConfig, dtype: torch.dtype) -> int:
    """Bytes of an entry in a cache of `dtype`."""
    if dtype == torch.int8:
        index = index_key_dim(attention)
        return int8_entry_bytes(attention.entry_dim, attention.quantized_dim, index)
    return attention.entry_dim * dtype.itemsize


def pack_entries(
    entries: Float[Tensor, "tokens entry_dim"], quantized: int
) -> UInt8[Tensor, "tokens entry_bytes"]:
    """The bytes of `entries`, their first `quantized` channels in int8."""
    wide = entries[:, :quantized].to(torch.float32)
    groups = F.pad(wide, (0, -quantized % SCALE_CHANNELS)).unflatten(1, (-1, SCALE_CHANNELS))
    scale = groups.abs().amax(dim=-1) / INT8_MAX
    divisor = torch.where(scale == 0, 1.0, scale)[..., None]
    values = (groups / divisor).round().to(torch.int8).flatten(1)[:, :quantized]
    values = F.pad(values, (0, _padded(quantized) - quantized))
    plain = entries[:, quantized:].to(torch.bfloat16).contiguous()
    return torch.cat([part.view(torch.uint8) for part in (values, scale, plain)], dim=1)


def unpack_entries(
    packed: UInt8[Tensor, "tokens entry_bytes"], entry_dim: int, quantized: int, dtype: torch.dtype
) -> Float[Tensor, "tokens entry_dim"]:
    """The inverse of `pack_entries`: multiplied in fp32, rounded once to `dtype`."""
    scales_at, count = _padded(quantized), -(-quantized // SCALE_CHANNELS)
    values = packed[:, :quantized].view(torch.int8).to(torch.float32)
    scale = packed[:, scales_at : scales_at + 4 * count].contiguous().view(torch.float32)
    scale = scale.repeat_interleave(SCALE_CHANNELS, dim=1)[:, :quantized]
    plain = packed[:, scales_at + 4 * count :].contiguous().view(torch.bfloat16)
    assert plain.shape[1] == entry_dim - quantized
    return torch.cat([(values * scale).to(dtype), plain.to(dtype)], dim=1)


def _padded(quantized: int) -> int:
    return -(-quantized // 4) * 4
