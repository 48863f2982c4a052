"""Two-way operations between checkpoint tensors and model parameters; `mapping` chooses them.

Each knows its file tensors, their shapes, and both directions, so that export cannot drift from
import. Reads and writes nothing itself: both directions take a function from name to tensor.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, final

from torch import Tensor

from lowlat.checkpoint import padded_latent as padding
from lowlat.config.hf.padded_latent import padded_rank
from lowlat.config.model import MLAConfig

Read = Callable[[str], Tensor]
Shapes = Mapping[str, tuple[int, ...]]


class Piece(NamedTuple):
    """A tensor for a parameter."""

    parameter: str
    tensor: Tensor


class Operation(ABC):
    """Some file tensors <-> some parameters."""

    @abstractmethod
    def file_shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """The file tensors and the shapes they must have, given the shapes of all parameters."""

    @abstractmethod
    def parameters(self) -> list[str]:
        """The parameters."""

    @abstractmethod
    def load(self, read: Read) -> Iterator[Piece]:
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

    def load(self, read: Read) -> Iterator[Piece]:
        yield Piece(self.parameter, read(self.file))

    def save(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        yield self.file, read(self.parameter)


@final
@dataclass(frozen=True, slots=True)
class PadLatent(Operation):
    """The attention of a layer whose latent is normalized in files but not in the model; see
    `padded_latent`.
    """

    file_prefix: str
    """'model.layers.3.self_attn.'"""
    parameter_prefix: str
    """'layers.3.self_attn.'"""
    attention: MLAConfig

    def file_shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        rows, hidden = shapes[self.parameter_prefix + "kv_a_proj_with_mqa.weight"]
        out, rank = shapes[self.parameter_prefix + "kv_b_proj.weight"]
        width = padded_rank(rank)
        result = {
            "kv_a_proj_with_mqa.weight": (rows - rank + width, hidden),
            "kv_a_proj_with_mqa.bias": (rows - rank + width,),
            "kv_a_layernorm.weight": (width,),
            "kv_b_proj.weight": (out, width),
            "o_proj.weight": shapes[self.parameter_prefix + "o_proj.weight"],
            "o_proj.bias": (hidden,),
        }
        q_rows = shapes[self.parameter_prefix + "q_proj.weight"][0]
        result |= self._query_shapes(q_rows, hidden)
        return {self.file_prefix + name: shape for name, shape in result.items()}

    def parameters(self) -> list[str]:
        return [self.parameter_prefix + name for name in parameter_names(self.attention)]

    def load(self, read: Read) -> Iterator[Piece]:
        tensors = {name: read(self.file_prefix + name) for name in self._file_names()}
        for name, tensor in padding.unpad_latent(tensors, self.attention, self.file_prefix).items():
            yield Piece(self.parameter_prefix + name, tensor)

    def save(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        tensors = {
            name: read(self.parameter_prefix + name) for name in parameter_names(self.attention)
        }
        for name, tensor in padding.pad_latent(tensors, self.attention).items():
            yield self.file_prefix + name, tensor

    def _query_shapes(self, rows: int, hidden: int) -> dict[str, tuple[int, ...]]:
        if not self.attention.q_bias:
            return {"q_proj.weight": (rows, hidden)}
        width = padded_rank(hidden)
        return {
            "q_a_proj.weight": (width, hidden),
            "q_a_proj.bias": (width,),
            "q_a_layernorm.weight": (width,),
            "q_b_proj.weight": (rows, width),
        }

    def _file_names(self) -> list[str]:
        names = ["kv_a_proj_with_mqa.weight", "kv_a_proj_with_mqa.bias", "kv_a_layernorm.weight"]
        names += ["kv_b_proj.weight", "o_proj.weight", "o_proj.bias"]
        return names + list(self._query_shapes(0, 0))


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
