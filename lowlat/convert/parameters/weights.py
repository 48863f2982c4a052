"""Parameter sources of a conversion: a checkpoint's parameters, and parameters derived from them.

Parameters are read one at a time. `convert.storage` writes them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import reduce
from typing import final

import torch
from torch import Tensor

from lowlat.checkpoint.mapping import check_tensors, operations
from lowlat.checkpoint.mapping_operations import Read, Rename
from lowlat.checkpoint.tensor_source import TensorSource
from lowlat.config.model import ModelConfig
from lowlat.model.transformer import Transformer

Shapes = dict[str, tuple[int, ...]]


class Weights(ABC):
    """The parameters of a model as plain matrices, by the model's names."""

    config: ModelConfig
    """The model's config, without storage fields."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The data type that holds the parameter without loss."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The parameter."""

    @abstractmethod
    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """`read(name)[start:stop]`, without computing the other rows if possible."""

    @abstractmethod
    def release(self, name: str) -> None:
        """Allow the parameter's memory-mapped pages to be evicted. It may be read again."""

    @abstractmethod
    def where(self, name: str) -> str:
        """Name of the parameter in error messages: file and tensor."""


@final
class SourceWeights(Weights):
    """A checkpoint's parameters, with checked names and shapes, and without padding of latents.

    source, config: without fp8 blocks and packed weights (`dequantized_source`).
    stored: config of the checkpoint.
    """

    def __init__(self, source: TensorSource, config: ModelConfig, *, stored: ModelConfig) -> None:
        self._source = source
        self.config = config
        shapes = parameter_shapes(config)
        plan = operations(config, shapes, stored=stored, source=source)
        check_tensors(config, source, plan, shapes)
        self._steps = {name: step for step in plan for name in step.parameters()}
        self._files = {
            name: list(step.file_shapes(shapes)) for step in plan for name in step.parameters()
        }
        self._held: dict[str, Tensor] = {}

    def dtype(self, name: str) -> torch.dtype:
        files = {self._source.dtype(file) for file in self._files[name]}
        return reduce(torch.promote_types, files)

    def read(self, name: str) -> Tensor:
        step = self._steps[name]
        if isinstance(step, Rename):
            return self._source.read(step.file)
        if name not in self._held:
            self._held = dict(step.load(self._source))
        return self._held[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        step = self._steps[name]
        if isinstance(step, Rename):
            return self._source.rows(step.file, start, stop)
        return self.read(name)[start:stop]

    def release(self, name: str) -> None:
        for file in self._files[name]:
            self._source.release(file)

    def where(self, name: str) -> str:
        return self._source.where(self._files[name][0])


@final
class DerivedWeights(Weights):
    """The parameters of `base`, except those selected by `derives`, which `read` computes.

    read: returns a whole parameter by name. It may cache one layer, so read parameters layer by
    layer. dtype: of the derived parameters.
    """

    def __init__(
        self,
        base: Weights,
        config: ModelConfig,
        read: Read,
        *,
        derives: Callable[[str], bool],
        dtype: torch.dtype,
    ) -> None:
        self._base = base
        self.config = config
        self._read = read
        self._derives = derives
        self._dtype = dtype

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype if self._derives(name) else self._base.dtype(name)

    def read(self, name: str) -> Tensor:
        return self._read(name) if self._derives(name) else self._base.read(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if self._derives(name):
            return self._read(name)[start:stop]
        return self._base.rows(name, start, stop)

    def release(self, name: str) -> None:
        if not self._derives(name):
            self._base.release(name)

    def where(self, name: str) -> str:
        if self._derives(name):
            return f"tensor '{name}' of the converted model"
        return self._base.where(name)


def parameter_shapes(config: ModelConfig) -> Shapes:
    """Names and shapes of the parameters of `config`, in file order."""
    with torch.device("meta"):
        parameters = Transformer(config, dtype=torch.bfloat16).state_dict()
    return {name: tuple(parameter.shape) for name, parameter in parameters.items()}
