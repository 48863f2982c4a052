"""Dequantize on read: a checkpoint with fp8 blocks or packed int8/int4 weights as plain floats."""

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from lowlat.checkpoint.fill_parameters import dtype_label
from lowlat.checkpoint.mapping import (
    SCALE_SUFFIX,
    check_scale_type,
    check_scale_values,
    file_name,
)
from lowlat.checkpoint.tensor_source import StoredTensor, TensorSource
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
    if config.quantization is None and config.packing is None:
        return source, plain
    weights = _packed(source, config, dtype)
    if config.quantization is not None:
        weights = _blocks(source, config.quantization, dtype)
    tensors = dict(source.tensors)
    for weight in weights:
        weight.check()
        for name in weight.scales():
            del tensors[name]
        tensors[weight.name] = weight
    if config.packing is not None and config.tie_word_embeddings:
        del tensors["lm_head.weight"]  # the tied embedding is read instead
    return replace(source, tensors=tensors), plain


@dataclass(frozen=True, slots=True)
class QuantizedWeight(StoredTensor):
    """A weight matrix that `source` stores as several tensors."""

    source: TensorSource
    name: str
    """Of the matrix."""

    @abstractmethod
    def scales(self) -> list[str]:
        """Names of the scale tensors."""

    @abstractmethod
    def check(self) -> None:
        """Raise UserError naming a tensor that is missing or has a wrong dtype or shape."""

    @property
    def where(self) -> str:
        return self.source.where(self.name)

    def read(self) -> Tensor:
        result = torch.empty(self.shape, dtype=self.dtype)
        step = max(CHUNK_ELEMENTS // self.shape[1] // ROW_STEP, 1) * ROW_STEP
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            result[start:stop] = self.rows(start, stop)
        return result

    def release(self) -> None:
        for name in (self.name, *self.scales()):
            self.source.release(name)


@final
@dataclass(frozen=True, slots=True)
class _Blocks(QuantizedWeight):
    """fp8 blocks with one scale each (DeepSeek-V3 section 3.3)."""

    quant: QuantConfig

    def scales(self) -> list[str]:
        return [self.name + SCALE_SUFFIX]

    def rows(self, start: int, stop: int) -> Tensor:
        name, block = self.name + SCALE_SUFFIX, self.quant.weight_block_size
        first = start // block[0]
        scale = self.source.rows(name, first, math.ceil(stop / block[0])).to(torch.float32)
        check_scale_values(scale, self.source.where(name))
        weight = self.source.rows(self.name, first * block[0], stop)
        return dequantize_blocks(weight, scale, block, self.dtype)[start - first * block[0] :]

    def check(self) -> None:
        source, shape, block = self.source, self.shape, self.quant.weight_block_size
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

    linear: Linear

    def scales(self) -> list[str]:
        prefix = self.name.removesuffix("weight")
        return [prefix + part for part in self._parts() if part != "weight"]

    def rows(self, start: int, stop: int) -> Tensor:
        prefix, linear = self.name.removesuffix("weight"), self.linear
        parts = {part: self.source.read(prefix + part) for part in self._parts()}
        return unpack_rows(
            parts, linear.storage, slice(start, stop), linear.in_features, self.dtype
        )

    def check(self) -> None:
        source, prefix = self.source, self.name.removesuffix("weight")
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


def _blocks(
    source: TensorSource, quant: QuantConfig, dtype: torch.dtype
) -> Iterator[QuantizedWeight]:
    for name, stored in source.tensors.items():
        if stored.dtype == torch.float8_e4m3fn and not name.endswith(SCALE_SUFFIX):
            yield _Blocks(stored.shape, dtype, source, name, quant)


def _packed(
    source: TensorSource, config: ModelConfig, dtype: torch.dtype
) -> Iterator[QuantizedWeight]:
    """All packed projections."""
    with torch.device("meta"):
        model = Transformer(config)
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            shape = (module.out_features, module.in_features)
            yield _Packed(shape, dtype, source, file_name(config, f"{path}.weight"), module)
