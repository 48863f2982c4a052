"""A checkpoint with fp8 blocks, seen as one of plain numbers: weights multiplied out as they are
read.
"""

import math
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from lowlat.checkpoint.mapping import SCALE_SUFFIX
from lowlat.checkpoint.source import TensorSource
from lowlat.config.model import QuantConfig
from lowlat.ops.fp8 import dequantize_blocks
from lowlat.utils.errors import UserError


@final
class DenseSource(TensorSource):
    """`source` without its scales: each fp8 weight is read as weight * scale, rounded once to
    `dtype`.

    `hf_config` stays the source's. Raises UserError naming a weight whose scales are missing or
    of a wrong shape.
    """

    def __init__(self, source: TensorSource, quant: QuantConfig, dtype: torch.dtype):
        self._source = source
        self._block = quant.weight_block_size
        self._dtype = dtype
        self._scaled = {
            name for name in source.names() if source.dtype(name) == torch.float8_e4m3fn
        }
        for name in self._scaled:
            self._check_scale(name)

    @property
    def path(self) -> Path:
        return self._source.path

    @property
    def hf_config(self) -> dict[str, Any]:
        return self._source.hf_config

    def names(self) -> list[str]:
        scales = {name + SCALE_SUFFIX for name in self._scaled}
        return [name for name in self._source.names() if name not in scales]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype if name in self._scaled else self._source.dtype(name)

    def read(self, name: str) -> Tensor:
        tensor = self._source.read(name)
        if name not in self._scaled:
            return tensor
        scale = self._source.read(name + SCALE_SUFFIX).to(torch.float32)
        if not bool(scale.isfinite().all()):
            raise UserError(
                f"{self.where(name + SCALE_SUFFIX)} is not finite; the checkpoint is damaged"
            )
        return dequantize_blocks(tensor, scale, self._block, self._dtype)

    def release(self, name: str) -> None:
        self._source.release(name)

    def where(self, name: str) -> str:
        return self._source.where(name)

    def _check_scale(self, name: str) -> None:
        shape = self._source.shape(name)
        if len(shape) != 2:
            raise UserError(f"{self.where(name)} is fp8 but not a matrix: shape {list(shape)}")
        grid = tuple(
            math.ceil(size / block) for size, block in zip(shape, self._block, strict=True)
        )
        scale_shape = self._source.shape(name + SCALE_SUFFIX)
        if scale_shape != grid:
            raise UserError(
                f"{self.where(name + SCALE_SUFFIX)} has shape {list(scale_shape)}, but "
                f"{list(shape)} in blocks of {list(self._block)} needs {list(grid)}"
            )
