"""Two-way operations between checkpoint tensors and model parameters; `mapping` chooses them.

Each knows its file tensors, their shapes, and both directions, so that export cannot drift from
import.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lowlat.checkpoint import padded_latent as padding
from lowlat.checkpoint.tensor_source import TensorSource
from lowlat.config.model import MLAConfig
from lowlat.utils.errors import UserError

Read = Callable[[str], Tensor]
Shapes = Mapping[str, tuple[int, ...]]


class Operation(ABC):
    """Some file tensors <-> some parameters."""

    @abstractmethod
    def file_shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """The file tensors and the shapes they must have, given the shapes of all parameters."""

    @abstractmethod
    def parameters(self) -> list[str]:
        """The parameters."""

    @abstractmethod
    def load(self, source: TensorSource) -> Iterator[tuple[str, Tensor]]:
        """File tensors to parameters, one at a time. Raises UserError for invalid tensors."""

    @abstractmethod
    def save(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        """Parameters to file tensors, one at a time."""


@final
@dataclass(frozen=True, slots=True)
class Rename(Operation):
    """One tensor under two names."""

    file: str
    parameter: str

    def file_shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        return {self.file: shapes[self.parameter]}

    def parameters(self) -> list[str]:
        return [self.parameter]

    def load(self, source: TensorSource) -> Iterator[tuple[str, Tensor]]:
        yield self.parameter, source.read(self.file)

    def save(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        yield self.file, read(self.parameter)


@final
@dataclass(frozen=True, slots=True)
class PadLatent(Operation):
    """The attention of a layer whose latent only files normalize; see `padded_latent`."""

    file_prefix: str
    """'model.layers.3.self_attn.'"""
    parameter_prefix: str
    """'layers.3.self_attn.'"""
    attention: MLAConfig

    def file_shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        # bool: a byte per element, so that the sizes of no config overflow 64 bits
        empty = {
            name: torch.empty(shapes[self.parameter_prefix + name], dtype=torch.bool, device="meta")
            for name in parameter_names(self.attention)
        }
        padded = padding.pad_latent(empty, self.attention)
        return {self.file_prefix + name: tuple(tensor.shape) for name, tensor in padded.items()}

    def parameters(self) -> list[str]:
        return [self.parameter_prefix + name for name in parameter_names(self.attention)]

    def load(self, source: TensorSource) -> Iterator[tuple[str, Tensor]]:
        def read(name: str) -> Tensor:
            return source.read(self.file_prefix + name)

        try:
            tensors = padding.unpad_latent(read, self.attention, self.file_prefix)
        except padding.PaddingError as error:
            raise UserError(f"{source.path}: {error}") from error
        for name, tensor in tensors.items():
            yield self.parameter_prefix + name, tensor

    def save(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        tensors = {
            name: read(self.parameter_prefix + name) for name in parameter_names(self.attention)
        }
        for name, tensor in padding.pad_latent(tensors, self.attention).items():
            yield self.file_prefix + name, tensor


def parameter_names(attention: MLAConfig) -> list[str]:
    """Names below self_attn of the parameters an exactly converted layer has."""
    names = ["q_proj.weight", "kv_a_proj_with_mqa.weight", "kv_b_proj.weight", "o_proj.weight"]
    if attention.q_bias:
        names.append("q_proj.bias")
    if attention.attention_bias:
        names.append("kv_a_proj_with_mqa.bias")
    if attention.attention_bias or attention.o_bias:
        names.append("o_proj.bias")
    return names
