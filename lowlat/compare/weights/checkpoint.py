"""Weights of a checkpoint by Hugging Face name, read through the loader's mapping.

A Hugging Face folder, a lowlat folder and a GGUF file of one model have the same names and layouts
here: packed weights and fp8 blocks are dequantized, padded latents of converted models unpadded.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from lowlat.checkpoint.dequantized_source import dequantized_source
from lowlat.checkpoint.fill_parameters import dtype_label
from lowlat.checkpoint.gguf.file import PLAIN
from lowlat.checkpoint.gguf.split import open_parts
from lowlat.checkpoint.gguf.tensor_layout import BY_EXPERT, BY_MODULE, BY_NAME
from lowlat.checkpoint.hf_folder import open_checkpoint
from lowlat.checkpoint.load import read_config
from lowlat.checkpoint.mapping import PLAIN_DTYPES, file_name, operations, resolve_mtp_modules
from lowlat.checkpoint.mapping_operations import Operation, Rename
from lowlat.config.model import ModelConfig
from lowlat.model.transformer import Transformer
from lowlat.utils.device import dtype_name

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_EXPERT = re.compile(r"mlp\.experts\.\d+\.(\w+)")


class CheckpointWeights:
    """All weights of the checkpoint at `path`; values are read when asked for."""

    def __init__(self, path: Path) -> None:
        self._stored = open_checkpoint(path)
        config = resolve_mtp_modules(read_config(self._stored), self._stored)
        self._file_config = config
        self._source, self.config = dequantized_source(self._stored, config, torch.float32)
        self._packing = config.packing
        self._kinds = {} if path.is_dir() else _block_types(path)
        self._steps: dict[str, tuple[Operation, str]] = {}
        self._files: dict[str, list[str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Shapes by Hugging Face name, in order of the model's parameters."""
        self._loaded: tuple[Operation, dict[str, Tensor]] | None = None
        self._find(self.config)

    def _find(self, config: ModelConfig) -> None:
        with torch.device("meta"):
            parameters = Transformer(config).state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
        for step in operations(config, shapes, stored=self._file_config, source=self._source):
            # Peers may run files that lack a tensor, or have it in another shape.
            wanted = step.file_shapes(shapes)
            if all(self._source_shape(name) == shape for name, shape in wanted.items()):
                for parameter in step.parameters():
                    name = file_name(config, parameter)
                    self._steps[name], self._files[name] = (step, parameter), list(wanted)
                    self.shapes[name] = shapes[parameter]

    def _source_shape(self, name: str) -> tuple[int, ...] | None:
        found = self._source.tensors.get(name)
        return None if found is None else found.shape

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a weight, in a float dtype."""
        step, parameter = self._steps[name]
        if isinstance(step, Rename):
            return self._source.rows(step.file, start, stop)
        if self._loaded is None or self._loaded[0] is not step:
            self._loaded = step, dict(step.load(self._source))
        return self._loaded[1][parameter][start:stop]

    def read(self, name: str) -> Tensor:
        """A weight in fp32; fp64 stays fp64."""
        return wide(self.rows(name, 0, self.shapes[name][0]))

    def release(self, name: str) -> None:
        """Release the memory pages of a weight."""
        for file in self._files[name]:
            self._source.release(file)

    def stored_type(self, name: str) -> str:
        """How the file stores a weight: 'bf16', 'fp8', 'int8', or a GGUF type such as 'Q4_K'."""
        file = self._files[name][0]
        kind = next((self._kinds[n] for n in _gguf_names(file) if n in self._kinds), None)
        if kind is not None:
            return kind
        if file not in self._stored.tensors:
            return self._packing or "int4"
        dtype = self._stored.dtype(file)
        if dtype not in PLAIN_DTYPES:
            return "fp8" if dtype == torch.float8_e4m3fn else self._packing or dtype_label(dtype)
        return dtype_name(dtype)


def wide(values: Tensor) -> Tensor:
    """`values` in fp32; fp64 stays fp64."""
    return values if values.dtype == torch.float64 else values.to(torch.float32)


def _block_types(path: Path) -> dict[str, str]:
    """Types of the quantized tensors of a GGUF file, by their names in the file."""
    tensors = open_parts(path).tensors
    return {name: each.kind.name for name, each in tensors.items() if each.kind not in PLAIN}


def _gguf_names(name: str) -> list[str]:
    """Names that a Hugging Face tensor may have in a GGUF file."""
    found = _LAYER.fullmatch(name)
    if found is None:
        return [BY_NAME.get(name, name)]
    block, module, kind = found.groups()
    if (expert := _EXPERT.fullmatch(module)) is not None:
        return [f"blk.{block}.{BY_EXPERT[expert[1]]}.{kind}"]
    modules = [BY_MODULE.get(module, module)]
    if module == "self_attn.kv_b_proj":
        modules += ["attn_k_b", "attn_v_b"]
    return [f"blk.{block}.{each}.{kind}" for each in modules]
