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
from lowlat.config.hf.padded_latent import padded_rank
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
class StackExperts(Operation):
    """The routed experts of a layer: two tensors in the file, one matrix per projection and expert
    in the model. gate_up_proj [experts, 2 inner, hidden], the gate first; down_proj [experts,
    hidden, inner].
    """

    file_prefix: str
    """'model.layers.3.mlp.experts.'"""
    parameter_prefix: str
    """'layers.3.mlp.experts.'"""
    experts: int

    def file_shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        inner, hidden = shapes[self._name(0, "gate_proj")]
        return {
            f"{self.file_prefix}gate_up_proj": (self.experts, 2 * inner, hidden),
            f"{self.file_prefix}down_proj": (self.experts, hidden, inner),
        }

    def parameters(self) -> list[str]:
        projections = ("gate_proj", "up_proj", "down_proj")
        return [self._name(n, one) for n in range(self.experts) for one in projections]

    def load(self, source: TensorSource) -> Iterator[tuple[str, Tensor]]:
        for expert, stacked in enumerate(source.read(f"{self.file_prefix}gate_up_proj")):
            gate, up = stacked.chunk(2)
            yield self._name(expert, "gate_proj"), gate
            yield self._name(expert, "up_proj"), up
        for expert, down in enumerate(source.read(f"{self.file_prefix}down_proj")):
            yield self._name(expert, "down_proj"), down

    def save(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        both = ("gate_proj", "up_proj")
        pairs = (torch.cat([read(self._name(n, one)) for one in both]) for n in range(self.experts))
        yield f"{self.file_prefix}gate_up_proj", torch.stack(list(pairs))
        down = [read(self._name(n, "down_proj")) for n in range(self.experts)]
        yield f"{self.file_prefix}down_proj", torch.stack(down)

    def _name(self, expert: int, projection: str) -> str:
        return f"{self.parameter_prefix}{expert}.{projection}.weight"


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
        rows, hidden = shapes[self.parameter_prefix + "kv_a_proj_with_mqa.weight"]
        out, rank = shapes[self.parameter_prefix + "kv_b_proj.weight"]
        q_rows, _ = shapes[self.parameter_prefix + "q_proj.weight"]
        width, q_width = padded_rank(rank), padded_rank(hidden)
        result = {
            "kv_a_proj_with_mqa.weight": (rows - rank + width, hidden),
            "kv_a_proj_with_mqa.bias": (rows - rank + width,),
            "kv_a_layernorm.weight": (width,),
            "kv_b_proj.weight": (out, width),
            "o_proj.weight": shapes[self.parameter_prefix + "o_proj.weight"],
            "o_proj.bias": (hidden,),
        }
        if self.attention.q_bias:
            result |= {
                "q_a_proj.weight": (q_width, hidden),
                "q_a_proj.bias": (q_width,),
                "q_a_layernorm.weight": (q_width,),
                "q_b_proj.weight": (q_rows, q_width),
            }
        else:
            result["q_proj.weight"] = (q_rows, hidden)
        return {self.file_prefix + name: shape for name, shape in result.items()}

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
