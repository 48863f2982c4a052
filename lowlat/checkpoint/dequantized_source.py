"""Dequantize on read: a checkpoint with fp8 blocks or packed int8/int4 weights as plain floats."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from lowlat.checkpoint.fill_parameters import dtype_label
from lowlat.checkpoint.mapping import (
    SCALE_SUFFIX,
    check_scale_type,
    check_scale_values,
    file_name,
)
from lowlat.checkpoint.tensor_source import TensorSource
from lowlat.config.model import ModelConfig, QuantConfig
from lowlat.model.linear import Linear, unpack_rows
from lowlat.model.transformer import Transformer
from lowlat.ops.fp8 import dequantize_blocks
from lowlat.utils.errors import UserError

CHUNK_ELEMENTS = 2**22
"""Elements dequantized at a time, so that intermediates stay small."""
ROW_STEP = 128
"""Rows are dequantized in multiples of this: whole blocks and tiles."""


def dequantized_source(
    source: TensorSource, config: ModelConfig, dtype: torch.dtype
) -> tuple[TensorSource, ModelConfig]:
    """`source` and its config as a checkpoint without fp8 blocks and packed weights.

    Each such weight is read as its exact values, rounded once to `dtype`; tensors keep the layout
    of `source` (packed ones have no padding). Raises UserError naming a weight whose scales are
    missing or have a wrong dtype or shape.
    """
    plain = replace(config, quantization=None, packing=None)
    if config.quantization is not None:
        names = [
            name
            for name in source.names()
            if source.dtype(name) == torch.float8_e4m3fn and not name.endswith(SCALE_SUFFIX)
        ]
        weights: dict[str, QuantizedWeight] = {
            name: _Blocks(name, config.quantization) for name in names
        }
        for weight in weights.values():
            weight.check(source)
        return DequantizedSource(source, weights, dtype), plain
    if config.packing is not None:
        weights = _packed_weights(config)
        for weight in weights.values():
            weight.check(source)
        # the tied embedding is read instead
        head = weights.pop("lm_head.weight") if config.tie_word_embeddings else None
        hidden = [] if head is None else ["lm_head.weight", *head.scales()]
        return DequantizedSource(source, weights, dtype, hidden), plain
    return source, plain


class QuantizedWeight(ABC):
    """A weight matrix that the file stores as several tensors."""

    @abstractmethod
    def scales(self) -> list[str]:
        """Names of the scale tensors."""

    @abstractmethod
    def shape(self, source: TensorSource) -> tuple[int, ...]:
        """Shape of the matrix."""

    @abstractmethod
    def check(self, source: TensorSource) -> None:
        """Raise UserError naming a tensor that is missing or has a wrong dtype or shape."""

    @abstractmethod
    def rows(self, source: TensorSource, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows of the matrix, computed in fp32 and rounded once to `dtype`."""


@final
@dataclass(frozen=True, slots=True)
class _Blocks(QuantizedWeight):
    """fp8 blocks with one scale each (DeepSeek-V3 section 3.3)."""

    name: str
    quant: QuantConfig

    def scales(self) -> list[str]:
        return [self.name + SCALE_SUFFIX]

    def shape(self, source: TensorSource) -> tuple[int, ...]:
        return source.shape(self.name)

    def rows(self, source: TensorSource, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        name, block = self.name + SCALE_SUFFIX, self.quant.weight_block_size
        first = start // block[0]
        scale = source.rows(name, first, math.ceil(stop / block[0])).to(torch.float32)
        check_scale_values(scale, source.where(name))
        weight = source.rows(self.name, first * block[0], stop)
        return dequantize_blocks(weight, scale, block, dtype)[start - first * block[0] :]

    def check(self, source: TensorSource) -> None:
        shape, block = source.shape(self.name), self.quant.weight_block_size
        if len(shape) != 2:
            raise UserError(f"{source.where(self.name)} is fp8 but not a matrix: {list(shape)}")
        grid = tuple(math.ceil(size / step) for size, step in zip(shape, block, strict=True))
        name = self.name + SCALE_SUFFIX
        if source.shape(name) != grid:
            raise UserError(
                f"{source.where(name)} has shape {list(source.shape(name))}, but {list(shape)} in "
                f"blocks of {list(block)} needs {list(grid)}"
            )
        check_scale_type(self.quant, source, name)


@final
@dataclass(frozen=True, slots=True)
class _Packed(QuantizedWeight):
    """int8 or int4, in the storage of `linear`."""

    name: str
    linear: Linear

    def scales(self) -> list[str]:
        prefix = self.name.removesuffix("weight")
        return [prefix + part for part in self._parts() if part != "weight"]

    def shape(self, source: TensorSource) -> tuple[int, ...]:
        return (self.linear.out_features, self.linear.in_features)

    def rows(self, source: TensorSource, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        prefix = self.name.removesuffix("weight")
        parts = {part: source.read(prefix + part) for part in self._parts()}
        rows = slice(start, stop)
        return unpack_rows(parts, self.linear.storage, rows, self.linear.in_features, dtype)

    def check(self, source: TensorSource) -> None:
        prefix = self.name.removesuffix("weight")
        for part, parameter in self._parts().items():
            name, shape = prefix + part, tuple(parameter.shape)
            found, dtype = source.shape(name), source.dtype(name)
            if dtype != parameter.dtype:
                raise UserError(
                    f"{source.where(name)} is {dtype_label(dtype)}, not "
                    f"{dtype_label(parameter.dtype)}, as quantization_config requires"
                )
            if found != shape:
                raise UserError(
                    f"{source.where(name)} has shape {list(found)}, but the config asks for "
                    f"{list(shape)}"
                )

    def _parts(self) -> dict[str, Tensor]:
        return {name: own for name, own in self.linear.named_parameters() if name != "bias"}


@final
class DequantizedSource(TensorSource):
    """`source` with `weights` dequantized to `dtype`, without their scales and `hidden` tensors;
    `hf_config` is unchanged.
    """

    def __init__(
        self,
        source: TensorSource,
        weights: Mapping[str, QuantizedWeight],
        dtype: torch.dtype,
        hidden: Iterable[str] = (),
    ):
        self._source = source
        self._weights = weights
        self._dtype = dtype
        self._hidden = set(hidden)
        self._hidden.update(scale for weight in weights.values() for scale in weight.scales())

    @property
    def path(self) -> Path:
        return self._source.path

    @property
    def hf_config(self) -> dict[str, Any]:
        return self._source.hf_config

    def names(self) -> list[str]:
        return [name for name in self._source.names() if name not in self._hidden]

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._weights:
            return self._weights[name].shape(self._source)
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype if name in self._weights else self._source.dtype(name)

    def read(self, name: str) -> Tensor:
        if name not in self._weights:
            return self._source.read(name)
        shape = self.shape(name)
        result = torch.empty(shape, dtype=self._dtype)
        step = max(CHUNK_ELEMENTS // shape[1] // ROW_STEP, 1) * ROW_STEP
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            result[start:stop] = self.rows(name, start, stop)
        return result

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._weights:
            return self._source.rows(name, start, stop)
        return self._weights[name].rows(self._source, start, stop, self._dtype)

    def release(self, name: str) -> None:
        self._source.release(name)
        for scale in self._weights[name].scales() if name in self._weights else []:
            self._source.release(scale)

    def where(self, name: str) -> str:
        return self._source.where(name)


def _packed_weights(config: ModelConfig) -> dict[str, QuantizedWeight]:
    """All packed projections by their names in files."""
    with torch.device("meta"):
        model = Transformer(config)
    result: dict[str, QuantizedWeight] = {}
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            name = file_name(config, f"{path}.weight")
            result[name] = _Packed(name, module)
    return result
