"""TensorSource: the interface of an opened checkpoint, whatever its file format.

Every format presents Hugging Face tensor names, layouts and config fields.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class TensorReader(ABC):
    """Tensors by name, on the CPU, read whole or by rows."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Dtype that holds the tensor without loss; touches no data."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The tensor: a view of the mapped file if the format allows it."""

    @abstractmethod
    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """`read(name)[start:stop]`, computed without the other rows if possible."""

    @abstractmethod
    def release(self, name: str) -> None:
        """Release the memory pages of `read(name)`'s result, which must not be used any more. The
        tensor may be read again.
        """

    @abstractmethod
    def where(self, name: str) -> str:
        """'FILE: tensor NAME', the start of an error message about this tensor."""


class TensorSource(TensorReader):
    """A checkpoint opened for reading. Names not in `names()` raise UserError naming file and
    tensor.
    """

    @property
    @abstractmethod
    def path(self) -> Path:
        """The folder or file."""

    @property
    @abstractmethod
    def hf_config(self) -> dict[str, Any]:
        """The model's config with the fields of a Hugging Face config.json. Read-only."""

    @abstractmethod
    def names(self) -> list[str]:
        """Names of all tensors, as Hugging Face writes them."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor `read` returns; touches no data."""
