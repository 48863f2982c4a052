"""GGUF file as a TensorSource: Hugging Face names, layouts and config, dequantized on read.

Reverses what llama.cpp's converter did to names and layouts: stacked experts, permuted q and k rows
of llama, kv_b_proj split with one half transposed (absorbed MLA). `file` reads the bytes,
`metadata_reader` the config.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from lowlat.checkpoint.gguf.file import PLAIN, GGUFFile
from lowlat.checkpoint.gguf.metadata_reader import architecture, hf_config
from lowlat.checkpoint.gguf.tensor_names import EXPERTS, GLOBAL_NAMES, MODULES, ROUTER_BIAS
from lowlat.checkpoint.tensor_source import TensorSource
from lowlat.utils.errors import UserError
from lowlat.utils.strict_json import quoted

IN_CONFIG = ("rope_freqs.weight",)
"""Tensors that became fields of the config."""

_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)\.(weight|bias)")


class _Part(NamedTuple):
    """How one Hugging Face tensor is computed from tensors of the file."""

    tensors: tuple[str, ...]
    """Names in the file."""
    shape: tuple[int, ...]
    rows: Callable[[int, int], Tensor]
    """Computes rows [start, stop) without reading the others."""
    blocks: Callable[[], Tensor] | None = None
    """Reads the rows as the file's bytes; None where rows are not those of the file."""


class GGUFBlocks(NamedTuple):
    """A matrix in blocks of a quantized type."""

    kind: int
    """Number of the GGUF type."""
    rows: Callable[[], Tensor]
    """Reads it, uint8 [rows, row_bytes]: a view of the mapped file, unless rows are permuted."""


@final
class GGUFSource(TensorSource):
    """A .gguf file of architecture llama, qwen2, qwen3 or deepseek2.

    Tensors stored as F16, F32, F64 or BF16 keep their dtype, all block formats are read as fp32.
    Tensors without a Hugging Face counterpart keep their name, so that strict loading reports them
    as left over.
    """

    def __init__(self, path: Path):
        self._gguf = GGUFFile(path)
        arch = architecture(self._gguf)
        if "token_embd.weight" not in self._gguf.tensors:
            raise UserError(
                f"{path}: tensor 'token_embd.weight' is missing; the file is incomplete"
            )
        self._config = hf_config(self._gguf, self._gguf.tensors["token_embd.weight"].shape[0])
        self._parts: dict[str, _Part] = {}
        for name in self._gguf.tensors:
            self._parts |= self._convert(arch, name)

    @property
    def path(self) -> Path:
        return self._gguf.path

    @property
    def hf_config(self) -> dict[str, Any]:
        return self._config

    def names(self) -> list[str]:
        return list(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._part(name).shape

    def dtype(self, name: str) -> torch.dtype:
        dtypes = [self._gguf.dtype(tensor) for tensor in self._part(name).tensors]
        return dtypes[0] if len(set(dtypes)) == 1 else torch.float32

    def read(self, name: str) -> Tensor:
        part = self._part(name)
        return part.rows(0, part.shape[0])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._part(name).rows(start, stop)

    def release(self, name: str) -> None:
        for tensor in self._part(name).tensors:
            self._gguf.release(tensor)

    def where(self, name: str) -> str:
        return f"{self.path}: tensor {quoted(self._part(name).tensors[0])}"

    def blocks(self, name: str) -> GGUFBlocks | None:
        """The tensor in blocks of its type; None if it is plain or its rows are computed."""
        part = self._part(name)
        kind = self._gguf.tensors[part.tensors[0]].kind
        if part.blocks is None or kind in PLAIN or len(part.shape) != 2:
            return None
        return GGUFBlocks(int(kind), part.blocks)

    def kv_b_halves(self, name: str) -> tuple[GGUFBlocks, GGUFBlocks] | None:
        """attn_k_b and attn_v_b, the halves of kv_b_proj `name`, if both are in blocks."""
        tensors = self._part(name).tensors
        kinds = [self._gguf.tensors[tensor].kind for tensor in tensors]
        if len(tensors) != 2 or any(kind in PLAIN for kind in kinds):
            return None
        keys, values = (
            GGUFBlocks(int(kind), partial(self._gguf.stored_rows, tensor))
            for tensor, kind in zip(tensors, kinds, strict=True)
        )
        return keys, values

    def has_blocks(self) -> bool:
        """Whether a tensor is in blocks."""
        return any(tensor.kind not in PLAIN for tensor in self._gguf.tensors.values())

    def stored_bytes(self) -> int:
        """Bytes of all tensors in the file."""
        return sum(tensor.stop - tensor.start for tensor in self._gguf.tensors.values())

    def _part(self, name: str) -> _Part:
        if name not in self._parts:
            raise UserError(f"{self.path}: tensor {quoted(name)} is missing")
        return self._parts[name]

    def _convert(self, arch: str, name: str) -> dict[str, _Part]:
        """The Hugging Face tensors that GGUF tensor `name` holds (alone or as the first of a
        pair).
        """
        shape = self._gguf.tensors[name].shape
        if name in IN_CONFIG:
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
        if arch == "llama" and module in ("attn_q", "attn_k"):
            return {hf_name: self._unpermuted(name, module)}
        return {hf_name: self._plain(name)}

    def _plain(self, name: str) -> _Part:
        rows = partial(self._rows, name)
        return _Part(
            (name,), self._gguf.tensors[name].shape, rows, partial(self._gguf.stored_rows, name)
        )

    def _expert(self, name: str, expert: int) -> _Part:
        shape = self._gguf.tensors[name].shape[1:]

        def rows(start: int, stop: int) -> Tensor:
            # the first two axes are one in the file
            return self._gguf.rows(name, first + start, first + stop)

        def blocks() -> Tensor:
            return self._gguf.stored_rows(name, first, first + shape[0])

        first = expert * shape[0]
        return _Part((name,), shape, rows, blocks)

    def _unpermuted(self, name: str, module: str) -> _Part:
        heads = self._config["num_attention_heads" if module == "attn_q" else "num_key_value_heads"]
        shape = self._gguf.tensors[name].shape
        if heads < 1 or shape[0] % (2 * heads):
            raise UserError(
                f"{self.path}: tensor {quoted(name)}: {shape[0]} rows are not {heads} even heads"
            )
        width = shape[0] // heads

        def of_heads(first: int, last: int) -> Tensor:
            return unpermute(self._rows(name, first * width, last * width), last - first)

        def blocks() -> Tensor:
            return unpermute(self._gguf.stored_rows(name), heads)

        return _Part((name,), shape, _by_heads(of_heads, width), blocks)

    def _rows(self, name: str, first: int, last: int) -> Tensor:
        """[first, last) of the first axis."""
        if len(self._gguf.tensors[name].shape) == 2:
            return self._gguf.rows(name, first, last)
        return self._gguf.read(name)[first:last]

    def _joined_kv_b(self, block: int) -> _Part:
        """kv_b_proj from attn_k_b [heads, latent, nope] and attn_v_b [heads, v, latent]."""
        names = (f"blk.{block}.attn_k_b.weight", f"blk.{block}.attn_v_b.weight")
        for name in names:
            if name not in self._gguf.tensors:
                raise UserError(
                    f"{self.path}: tensor {name!r} is missing; the file has its other half only"
                )
        keys, values = (self._gguf.tensors[name].shape for name in names)
        if len(keys) != 3 or len(values) != 3 or (keys[0], keys[1]) != (values[0], values[2]):
            raise UserError(
                f"{self.path}: tensor {names[0]!r}: shape {list(keys)} does not fit {list(values)}"
            )
        width = keys[2] + values[1]

        def of_heads(first: int, last: int) -> Tensor:
            halves = (
                self._gguf.rows(name, first * size[1], last * size[1]).unflatten(0, (-1, size[1]))
                for name, size in zip(names, (keys, values), strict=True)
            )
            return join_kv_b(*halves)

        return _Part(names, (keys[0] * width, keys[1]), _by_heads(of_heads, width))


def _by_heads(of_heads: Callable[[int, int], Tensor], width: int) -> Callable[[int, int], Tensor]:
    """Turn a function of head ranges, `width` rows per head, into one of row ranges."""

    def rows(start: int, stop: int) -> Tensor:
        first, last = start // width, -(-stop // width)
        return of_heads(first, last)[start - first * width : stop - first * width]

    return rows


def unpermute(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from GGUF's order (pairs adjacent) to Hugging Face's (real parts, then
    imaginary).
    """
    # [heads * pairs * 2, ...] -> heads x pairs x 2 -> heads x 2 x pairs
    pairs = tensor.view(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def join_kv_b(keys: Tensor, values: Tensor) -> Tensor:
    """attn_k_b [heads, latent, nope] and attn_v_b [heads, v, latent] as kv_b_proj [heads * (nope
    + v), latent].
    """
    dtype = keys.dtype if keys.dtype == values.dtype else torch.float32
    joint = torch.cat([keys.to(dtype).transpose(1, 2), values.to(dtype)], dim=1)
    return joint.flatten(0, 1)
