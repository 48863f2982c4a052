"""Export of an FP8 training as a checkpoint in the layout of released DeepSeek-V3 weights: fp8
blocks of 128x128 with weight_scale_inv, quantized from the master weights.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lowlat.checkpoint.mapping import ROUTER_BIAS, SCALE_SUFFIX
from lowlat.checkpoint.save import MAX_SHARD_BYTES, file_tensors, text_files, write_checkpoint
from lowlat.config.hf.writer import config_to_hf
from lowlat.config.model import ModelConfig, QuantConfig
from lowlat.model.transformer import Transformer
from lowlat.ops.fp8 import quantize_blocks
from lowlat.ops.fp8_training import ScaleFormat
from lowlat.utils.errors import UserError


def save_fp8(
    config: ModelConfig,
    parameters: Mapping[str, Tensor],
    dst: Path,
    *,
    source: Path | None,
    scale_fmt: ScaleFormat = None,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ModelConfig:
    """Write `parameters` (names of a model without stacked experts) as the folder `dst` in the
    layout of released FP8 checkpoints; returns the written config.

    Weights that FP8 training quantizes are stored as fp8 with weight_scale_inv per 128x128 block,
    bit-identical to the training's. Other weights are rounded to `dtype`; router biases stay fp32.
    Tokenizer files come from `source` (folder, .gguf, None). One quantized tensor is in memory at a
    time. Raises UserError as `write_checkpoint`, and naming a weight that is not finite.
    """
    quantized = replace(config, quantization=QuantConfig(scale_fmt=scale_fmt))
    raw = config_to_hf(quantized)
    raw["dtype"] = str(dtype).removeprefix("torch.")
    stored = Fp8Parameters(quantized, parameters, dtype)
    with_text = text_files(source) if source is not None else {}
    write_checkpoint(
        dst,
        raw,
        file_tensors(quantized, stored),
        max_shard_bytes=max_shard_bytes,
        extra_files=with_text,
    )
    return quantized


class Fp8Parameters(Mapping[str, Tensor]):
    """Parameters of an FP8 checkpoint, quantized lazily from the master weights."""

    def __init__(
        self, config: ModelConfig, masters: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        assert config.quantization is not None
        self._quant = config.quantization
        self._masters = masters
        self._dtype = dtype
        with torch.device("meta"):
            self._stored = Transformer(config, dtype=dtype).state_dict()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, name: str) -> Tensor:
        if name.endswith(SCALE_SUFFIX):
            return self._blocks(name.removesuffix(SCALE_SUFFIX))[1]
        if self._stored[name].dtype == torch.float8_e4m3fn:
            return self._blocks(name)[0]
        dtype = torch.float32 if name.endswith(ROUTER_BIAS) else self._dtype
        return self._masters[name].detach().to(dtype)

    def _blocks(self, name: str) -> tuple[Tensor, Tensor]:
        weight = self._masters[name].detach()
        if not bool(weight.isfinite().all()):
            raise UserError(f"{name} has values that are not finite; export an earlier state")
        return quantize_blocks(weight, self._quant.weight_block_size, self._quant.scale_fmt)
