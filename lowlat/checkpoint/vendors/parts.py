"""A quantized weight that a file stores as several tensors: presence, dtypes and shapes of them."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowlat.checkpoint.tensor_source import StoredTensor, TensorSource
from lowlat.utils.errors import UserError

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHUNK_ELEMENTS = 2**22
"""Elements converted at a time, so that intermediates stay small."""
ROW_STEP = 16
"""Rows are converted in multiples of this."""


@dataclass(frozen=True, slots=True)
class VendorWeight(StoredTensor):
    """A weight matrix; `read` dequantizes it to fp32, exact or rounded once."""

    source: TensorSource
    parts: tuple[str, ...]
    """Its tensors in the file; the first is the one that errors name."""

    @abstractmethod
    def dequantize(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) in fp32."""

    @property
    def where(self) -> str:
        return self.source.where(self.parts[0])

    def read(self) -> Tensor:
        result = torch.empty(self.shape, dtype=self.dtype)
        for start, stop in self.chunks():
            result[start:stop] = self.dequantize(start, stop)
        return result

    def rows(self, start: int, stop: int) -> Tensor:
        first = start // ROW_STEP * ROW_STEP
        return self.dequantize(first, stop)[start - first :].to(self.dtype)

    def release(self) -> None:
        for name in self.parts:
            self.source.release(name)

    def chunks(self) -> list[tuple[int, int]]:
        """Ranges of rows that are converted at a time."""
        rows, columns = self.shape
        step = max(CHUNK_ELEMENTS // max(columns, 1) // ROW_STEP, 1) * ROW_STEP
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def check_part(
    source: TensorSource, name: str, dtypes: Sequence[torch.dtype], *shapes: tuple[int, ...]
) -> None:
    """Raise UserError unless the tensor `name` is there, in one of these dtypes and shapes."""
    found, dtype = source.shape(name), source.dtype(name)
    if dtype not in dtypes:
        raise UserError(
            f"{source.where(name)} is {_label(dtype)}, not {' or '.join(map(_label, dtypes))}, as "
            "quantization_config requires; download the model again"
        )
    if found not in shapes:
        raise UserError(
            f"{source.where(name)} has shape {list(found)}, but its weight and quantization_config "
            f"need {' or '.join(str(list(shape)) for shape in shapes)}; take config.json and "
            "weights from one model"
        )


def check_finite(values: Tensor, where: str) -> Tensor:
    """`values`. Raises UserError starting with `where` unless all are finite."""
    if not bool(values.isfinite().all()):
        raise UserError(f"{where} holds values that are not finite; the checkpoint is damaged")
    return values


def matrix_shape(source: TensorSource, name: str) -> tuple[int, int]:
    """The shape of a tensor that must be a matrix. Raises UserError otherwise."""
    shape = source.shape(name)
    if len(shape) != 2:
        raise UserError(
            f"{source.where(name)} has shape {list(shape)}, but is no matrix; download the model "
            "again"
        )
    return shape[0], shape[1]


def _label(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
