"""TensorSource: an opened checkpoint, whatever its file format and the storage of its tensors.

Every format presents Hugging Face tensor names, layouts and config fields. A storage is one
`StoredTensor`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from lowlat.utils.errors import UserError
from lowlat.utils.strict_json import quoted


class Blocks(NamedTuple):
    """A matrix as rows in blocks of a quantized type."""

    kind: int
    """Number of the type (`ops.gguf_blocks`)."""
    rows: Callable[[], Tensor]
    """Reads it, uint8 [rows, row_bytes]."""
    in_file: bool = True
    """Whether `rows` is a view of the mapped file, not a copy in memory."""


@dataclass(frozen=True, slots=True)
class ScaledRows:
    """A matrix in fp8 (e4m3) with a scale per row."""

    weight: Callable[[], Tensor]
    """Reads the values [rows, columns], a view of the mapped file."""
    scale: Callable[[], Tensor]
    """Reads the scales, fp32 [rows]."""


Quantized = tuple[Blocks, ...] | ScaledRows
"""How a quantized matrix is kept: in blocks, as two matrices if it is a kv_b_proj of attn_k_b and
attn_v_b; or with scaled rows. Empty for other tensors.
"""


@dataclass(frozen=True, slots=True)
class StoredTensor(ABC):
    """One tensor of a checkpoint, as Hugging Face lays it out."""

    shape: tuple[int, ...]
    """Shape of the tensor `read` returns."""
    dtype: torch.dtype
    """Dtype of the tensor `read` returns."""

    @property
    @abstractmethod
    def where(self) -> str:
        """'FILE: tensor NAME', the start of an error message about this tensor."""

    def quantized(self) -> Quantized:
        """The storage in which a quantized matrix is multiplied without expanding it."""
        return ()

    @abstractmethod
    def read(self) -> Tensor:
        """The tensor, on the CPU: a view of the mapped file if the storage allows it."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """`read()[start:stop]`, computed without the other rows if the storage allows it."""

    @abstractmethod
    def release(self) -> None:
        """Release the memory pages of `read`'s result, which must not be used any more."""


@final
@dataclass(frozen=True, slots=True)
class TensorSource:
    """An opened checkpoint. Methods raise UserError for names of tensors that it does not have."""

    path: Path
    """The folder or file."""
    hf_config: dict[str, Any]
    """The model's config with the fields of a Hugging Face config.json. Read-only."""
    tensors: Mapping[str, StoredTensor]
    """All tensors by name, as Hugging Face writes them."""
    files: tuple[str, ...] = ()
    """Name, bytes and modification time (ns) of each weight file, as opened."""

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._tensor(name).dtype

    def where(self, name: str) -> str:
        return self._tensor(name).where

    def read(self, name: str) -> Tensor:
        return self._tensor(name).read()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._tensor(name).rows(start, stop)

    def release(self, name: str) -> None:
        self._tensor(name).release()

    def _tensor(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise UserError(f"{self.path}: tensor {quoted(name)} is missing")
        return self.tensors[name]
