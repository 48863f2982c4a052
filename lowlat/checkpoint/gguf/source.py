"""GGUF file as a TensorSource: Hugging Face names, layouts and config, dequantized on read.

Reverses what llama.cpp's converter did to names and layouts: stacked experts, permuted q and k rows
of llama, kv_b_proj split with one half transposed (absorbed MLA). `file` reads the bytes,
`metadata_reader` the config.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from lowlat.checkpoint.gguf.file import PLAIN, GGUFFile
from lowlat.checkpoint.gguf.metadata_reader import architecture, hf_config
from lowlat.checkpoint.gguf.split import open_parts
from lowlat.checkpoint.gguf.tensor_layout import (
    EXPERTS,
    GLOBAL_NAMES,
    MODULES,
    ROPE_TENSORS,
    ROUTER_BIAS,
    join_kv_b,
    unpermute,
)
from lowlat.checkpoint.tensor_source import Blocks, Quantized, StoredTensor, TensorSource
from lowlat.utils.errors import UserError
from lowlat.utils.strict_json import quoted

_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)\.(weight|bias)")


@final
@dataclass(frozen=True, slots=True)
class _Computed(StoredTensor):
    """A Hugging Face tensor, computed from tensors of the file."""

    file: GGUFFile
    names: tuple[str, ...]
    """Names in the file."""
    compute: Callable[[int, int], Tensor]
    """Computes rows [start, stop) without reading the others."""
    blocks: tuple[Blocks, ...]
    """The matrix in blocks of its type; empty if a part of it is plain."""

    @property
    def where(self) -> str:
        return f"{self.file.path_of(self.names[0])}: tensor {quoted(self.names[0])}"

    def quantized(self) -> Quantized:
        return self.blocks

    def read(self) -> Tensor:
        return self.compute(0, self.shape[0])

    def rows(self, start: int, stop: int) -> Tensor:
        return self.compute(start, stop)

    def release(self) -> None:
        for name in self.names:
            self.file.release(name)


def open_gguf(path: Path) -> TensorSource:
    """Open a .gguf file, or any part of a split one, of one of the ARCHITECTURES of
    `metadata_reader`.

    Tensors stored as F16, F32, F64 or BF16 keep their dtype, all block formats are read as fp32.
    Tensors without a Hugging Face counterpart keep their name, so that strict loading reports them
    as left over.
    """
    file = open_parts(path)
    arch = architecture(file)
    if "token_embd.weight" not in file.tensors:
        raise UserError(
            f"{file.path}: tensor 'token_embd.weight' is missing; the file is incomplete"
        )
    config = hf_config(file, file.tensors["token_embd.weight"].shape[0])
    layout = _Layout(file, arch, config)
    tensors: dict[str, StoredTensor] = {}
    for name in file.tensors:
        tensors |= layout.convert(name)
    return TensorSource(file.path, config, tensors, file.versions)


@final
class _Layout:
    """Converts the tensors of one file."""

    def __init__(self, file: GGUFFile, arch: str, config: dict[str, Any]):
        self._gguf, self._arch, self._config = file, arch, config

    def convert(self, name: str) -> dict[str, StoredTensor]:
        """The Hugging Face tensors that GGUF tensor `name` holds, alone or as one of a pair."""
        shape = self._gguf.tensors[name].shape
        if name in ROPE_TENSORS:  # a field of the config
            return {}
        match = _BLOCK.fullmatch(name)
        if match is None:
            return {GLOBAL_NAMES.get(name, name): self._plain(name)}
        block, module, kind = int(match[1]), match[2], match[3]
        prefix = f"model.layers.{block}."
        if module == ROUTER_BIAS:
            return {f"{prefix}mlp.gate.e_score_correction_bias": self._plain(name)}
        if module in EXPERTS and len(shape) == 3:
            return {
                f"{prefix}mlp.experts.{expert}.{EXPERTS[module]}.{kind}": self._expert(name, expert)
                for expert in range(shape[0])
            }
        if module in ("attn_k_b", "attn_v_b"):
            return {f"{prefix}self_attn.kv_b_proj.weight": self._joined_kv_b(block)}
        hf_name = f"{prefix}{MODULES[module]}.{kind}" if module in MODULES else name
        if self._arch == "llama" and module in ("attn_q", "attn_k"):
            return {hf_name: self._unpermuted(name, module)}
        return {hf_name: self._plain(name)}

    def _error(self, name: str, problem: str) -> UserError:
        where = self._gguf.path_of(name) if name in self._gguf.tensors else self._gguf.path
        return UserError(f"{where}: tensor {quoted(name)}{problem}")

    def _computed(
        self,
        names: tuple[str, ...],
        shape: tuple[int, ...],
        compute: Callable[[int, int], Tensor],
        *readers: Callable[[], Tensor],
    ) -> StoredTensor:
        """`readers`: how the bytes of each of `names` are read."""
        dtypes = {self._gguf.dtype(name) for name in names}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        kinds = [self._gguf.tensors[name].kind for name in names]
        blocks = tuple(map(Blocks, map(int, kinds), readers))
        if len(shape) != 2 or any(kind in PLAIN for kind in kinds):
            blocks = ()
        return _Computed(shape, dtype, self._gguf, names, compute, blocks)

    def _plain(self, name: str) -> StoredTensor:
        shape = self._gguf.tensors[name].shape
        stored = partial(self._gguf.stored_rows, name)
        return self._computed((name,), shape, partial(self._rows, name), stored)

    def _expert(self, name: str, expert: int) -> StoredTensor:
        shape = self._gguf.tensors[name].shape[1:]

        def rows(start: int, stop: int) -> Tensor:
            # the first two axes are one in the file
            return self._gguf.rows(name, first + start, first + stop)

        first = expert * shape[0]
        stored = partial(self._gguf.stored_rows, name, first, first + shape[0])
        return self._computed((name,), shape, rows, stored)

    def _unpermuted(self, name: str, module: str) -> StoredTensor:
        heads = self._config["num_attention_heads" if module == "attn_q" else "num_key_value_heads"]
        shape = self._gguf.tensors[name].shape
        if heads < 1 or shape[0] % (2 * heads):
            raise self._error(name, f": {shape[0]} rows are not {heads} even heads")
        width = shape[0] // heads

        def of_heads(first: int, last: int) -> Tensor:
            return unpermute(self._rows(name, first * width, last * width), last - first)

        def stored() -> Tensor:
            return unpermute(self._gguf.stored_rows(name), heads)

        return self._computed((name,), shape, _by_heads(of_heads, width), stored)

    def _rows(self, name: str, first: int, last: int) -> Tensor:
        """[first, last) of the first axis."""
        if len(self._gguf.tensors[name].shape) == 2:
            return self._gguf.rows(name, first, last)
        return self._gguf.read(name)[first:last]

    def _joined_kv_b(self, block: int) -> StoredTensor:
        """kv_b_proj from attn_k_b [heads, latent, nope] and attn_v_b [heads, v, latent]."""
        names = (f"blk.{block}.attn_k_b.weight", f"blk.{block}.attn_v_b.weight")
        for name in names:
            if name not in self._gguf.tensors:
                raise self._error(name, " is missing; the file has its other half only")
        keys, values = (self._gguf.tensors[name].shape for name in names)
        if len(keys) != 3 or len(values) != 3 or (keys[0], keys[1]) != (values[0], values[2]):
            raise self._error(names[0], f": shape {list(keys)} does not fit {list(values)}")
        width = keys[2] + values[1]

        def of_heads(first: int, last: int) -> Tensor:
            halves = (
                self._gguf.rows(name, first * size[1], last * size[1]).unflatten(0, (-1, size[1]))
                for name, size in zip(names, (keys, values), strict=True)
            )
            return join_kv_b(*halves)

        shape = (keys[0] * width, keys[1])
        stored = (partial(self._gguf.stored_rows, name) for name in names)
        return self._computed(names, shape, _by_heads(of_heads, width), *stored)


def _by_heads(of_heads: Callable[[int, int], Tensor], width: int) -> Callable[[int, int], Tensor]:
    """Turn a function of head ranges, `width` rows per head, into one of row ranges."""

    def rows(start: int, stop: int) -> Tensor:
        first, last = start // width, -(-stop // width)
        return of_heads(first, last)[start - first * width : stop - first * width]

    return rows
