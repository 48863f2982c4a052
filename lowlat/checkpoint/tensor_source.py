"""The interface through which every file format offers its tensors: Hugging Face names, layout
and config.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class TensorSource(ABC):
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
        """The model's config in the words of a Hugging Face config.json. Not to be changed."""

    @abstractmethod
    def names(self) -> list[str]:
        """Names of all tensors, as Hugging Face writes them."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor `read` returns; touches no data."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Dtype of the tensor `read` returns; touches no data."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU: a view of the mapped file where the stored form allows it."""

    @abstractmethod
    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """`read(name)[start:stop]`, made without the other rows where the stored form allows it."""

    @abstractmethod
    def release(self, name: str) -> None:
        """The caller is done with `read(name)`'s result: its pages may leave memory."""

    @abstractmethod
    def where(self, name: str) -> str:
        """'FILE: tensor NAME', the start of an error message about this tensor."""
