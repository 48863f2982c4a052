"""Linear with plain, fp8, int8 or int4 weights, norms and Embedding; arithmetic is in `ops`."""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from lowlat.config.model import QuantConfig
from lowlat.ops import gguf_blocks, native, native_kernels, quantized
from lowlat.ops.calibrated_quantization import Importance, quantize_calibrated
from lowlat.ops.fp8 import dequantize_blocks, dequantize_fp8_rows
from lowlat.ops.norm import layer_norm, rms_norm
from lowlat.ops.quantized import (
    INT4_SHAPE,
    INT8_SHAPE,
    TILE,
    Empty,
    Int4Weight,
    Int8Rows,
    Int8Weight,
    dequantize_int4,
    dequantize_int8,
    dequantize_rows,
    num_groups,
    num_tiles,
    quantize_rows,
)
from lowlat.utils.errors import UserError

Storage = Literal["plain", "fp8", "int8", "int4", "fp8_rows", "int8_rows", "gguf"]
"""Storage formats of a weight."""


def has_native_kernel(dense: Float[Tensor, "out in"]) -> bool:
    """Whether the native kernels can quantize `dense`."""
    is_known = dense.dtype in (torch.float32, torch.bfloat16) and dense.stride(-1) == 1
    return dense.device.type == "cpu" and is_known and native.available()


def pack(
    dense: Float[Tensor, "out in"],
    storage: Storage,
    empty: Empty = torch.empty,
    importance: Callable[[], Importance] | None = None,
) -> dict[str, Shaped[Tensor, "..."]]:
    """Quantize `dense` to a packed storage: weight, weight_scale, weight_minimum, allocated by
    `empty`.

    importance: measures that of the input channels; weights are then quantized by
    activation-weighted error (`calibrated_quantization`). It is not called if scales that cover the
    range of the weights (min-max), which take a fraction of the time, have no error. Scales are
    non-finite where `dense` is, or exceeds the range of the storage.
    """
    if importance is not None:
        assert storage in ("int4", "int8", "int8_rows")
        plain = pack(dense, storage, empty)
        rows, columns = dense.shape
        if torch.equal(
            unpack_rows(plain, storage, slice(0, rows), columns, torch.float32), dense.float()
        ):
            return plain
        return quantize_calibrated(dense, storage, importance(), empty)._asdict()
    kernels = native_kernels if has_native_kernel(dense) else quantized
    if storage == "int4":
        return kernels.quantize_int4(dense, empty)._asdict()
    if storage == "int8":
        return kernels.quantize_int8(dense, empty)._asdict()
    assert storage == "int8_rows"
    return quantize_rows(dense, empty)._asdict()


def unpack_rows(
    parts: Mapping[str, Shaped[Tensor, "..."]],
    storage: Storage,
    rows: slice,
    columns: int,
    dtype: torch.dtype,
) -> Float[Tensor, "rows in"]:
    """Rows of the matrix that `pack` quantized to `parts`, computed in fp32 and rounded once."""
    if storage == "int8_rows":
        own = Int8Rows(*(parts[name][rows] for name in Int8Rows._fields))
        return dequantize_rows(own, dtype)
    first = rows.start // TILE
    tiles, skipped = slice(first, num_tiles(rows.stop)), rows.start - first * TILE
    count = rows.stop - first * TILE
    if storage == "int8":
        eight = Int8Weight(*(parts[name][tiles] for name in Int8Weight._fields))
        return dequantize_int8(eight, count, columns, dtype)[skipped:]
    assert storage == "int4"
    four = Int4Weight(*(parts[name][tiles] for name in Int4Weight._fields))
    return dequantize_int4(four, count, columns, dtype)[skipped:]


def block_grid(rows: int, columns: int, block: tuple[int, int]) -> tuple[int, int]:
    """Number of blocks along each axis; the last ones may be smaller."""
    return -(-rows // block[0]), -(-columns // block[1])


class Linear(nn.Module):
    """y = x W^T + b, with the weight in one of the formats of `Storage`.

    plain      weight [out, in] of a float dtype
    fp8        weight [out, in], weight_scale_inv per block (`ops.fp8`)
    int8       weight and weight_scale in tiles (`ops.quantized`)
    int4       weight, weight_scale and weight_minimum in tiles
    fp8_rows   weight [out, in], weight_scale [out]
    int8_rows  weight [out, in], weight_scale [out]
    gguf       weight [out, row_bytes] in blocks of type `gguf_type`, GGUF's or of
               `ops.int4_blocks`, or `is_interleaved` in tiles of 16 rows
               (`ops.gguf_blocks.interleave`); an MLA up-projection may be split instead: the
               values' rows of all heads in weight, the keys' rows, each head transposed, in
               weight_keys [heads * in, row_bytes] of type `keys_type`, or `keys_interleaved`
    """

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = False, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.storage: Storage = "plain"
        self.block: tuple[int, int] | None = None
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype))
        self.weight_scale_inv: nn.Parameter | None = None
        self.weight_scale: nn.Parameter | None = None
        self.weight_minimum: nn.Parameter | None = None
        self.weight_keys: nn.Parameter | None = None
        self.gguf_type: int | None = None
        self.is_interleaved = False
        self.keys_type: int | None = None
        self.keys_interleaved = False
        self.parts, self.part = 1, slice(None)
        """Processes that divide the rows, and the rows of this one in the checkpoint's matrix."""
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype)) if bias else None

    def keep_part(self, rank: int, size: int) -> None:
        """Keep the rows of one of `size` processes of a still unfilled matrix. Raises UserError for
        rows that do not divide, or not into whole blocks of its storage."""
        if self.out_features % size:
            raise UserError(
                f"tensor={size} does not divide {self.out_features} rows of a projection"
            )
        rows = self.out_features // size
        self.parts, self.part = size, slice(rank * rows, (rank + 1) * rows)
        for name, parameter in list(self.named_parameters(recurse=False)):
            own = self.rows_of(name, parameter)
            setattr(self, name, nn.Parameter(own.detach(), requires_grad=parameter.requires_grad))
        self.out_features = rows

    def rows_of(self, name: str, stored: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """This process's part of the checkpoint's parameter `name`. Raises UserError as
        `keep_part`."""
        if self.parts == 1:
            return stored
        unit = 1
        if self.storage in ("int8", "int4") and name != "bias":
            unit = TILE
        elif name == "weight_scale_inv":
            assert self.block is not None
            unit = self.block[0]
        if self.part.start % unit or self.part.stop % unit:
            rows = self.parts * (self.part.stop - self.part.start)
            raise UserError(
                f"tensor={self.parts} divides the {rows} rows of a projection within a block of "
                f"{unit} rows; give less"
            )
        return stored[self.part.start // unit : self.part.stop // unit]

    def store_fp8(self, quant: QuantConfig) -> None:
        """Replace the (still unfilled) weight by fp8 blocks and their scales."""
        self.storage, self.block = "fp8", quant.weight_block_size
        shape = (self.out_features, self.in_features)
        grid = block_grid(*shape, self.block)
        self.weight_scale_inv = self._unfilled(grid, torch.float32)
        self.weight = self._unfilled(shape, torch.float8_e4m3fn)

    def store_packed(self, storage: Storage) -> None:
        """Replace the (still unfilled) weight by that of a packed storage."""
        self.storage = storage
        rows, columns = self.out_features, self.in_features
        if storage == "int8_rows":
            self.weight_scale = self._unfilled((rows,), torch.float32)
            self.weight = self._unfilled((rows, columns), torch.int8)
            return
        tiles, groups = num_tiles(rows), num_groups(columns)
        self.weight_scale = self._unfilled((tiles, groups, TILE), torch.float16)
        if storage == "int4":
            self.weight_minimum = self._unfilled((tiles, groups, TILE), torch.float16)
        group_shape = INT4_SHAPE if storage == "int4" else INT8_SHAPE
        self.weight = self._unfilled((tiles, groups, *group_shape), torch.uint8)

    def store_fp8_rows(self) -> None:
        """Replace the (still unfilled) weight by fp8 with a scale per row."""
        self.storage = "fp8_rows"
        self.weight_scale = self._unfilled((self.out_features,), torch.float32)
        self.weight = self._unfilled((self.out_features, self.in_features), torch.float8_e4m3fn)

    def store_gguf(self, kind: int, *, interleaved: bool) -> None:
        """Replace the (still unfilled) weight by rows in blocks of type number `kind`."""
        self.storage, self.gguf_type, self.is_interleaved = "gguf", kind, interleaved
        shape = gguf_blocks.stored_shape(kind, self.out_features, self.in_features, interleaved)
        self.weight = self._unfilled(shape, torch.uint8)

    def store_gguf_heads(
        self, keys: int, values: int, heads: int, nope_dim: int, *, interleaved: tuple[bool, bool]
    ) -> None:
        """Replace the (still unfilled) weight of MLA's kv_b_proj by its two halves in GGUF blocks:
        transposed keys [heads * in, nope_dim] of type `keys`, values [heads * v_dim, in] of type
        `values`. A half may be `interleaved` if a head has whole tiles of its rows.
        """
        self.storage, self.keys_type, self.gguf_type = "gguf", keys, values
        self.keys_interleaved, self.is_interleaved = interleaved
        size = gguf_blocks.row_bytes(keys, nope_dim)
        self.weight_keys = self._unfilled((heads * self.in_features, size), torch.uint8)
        rows = self.out_features - heads * nope_dim
        size = gguf_blocks.row_bytes(values, self.in_features)
        self.weight = self._unfilled((rows, size), torch.uint8)

    def pack(
        self, dense: Float[Tensor, "out in"], empty: Empty = torch.empty
    ) -> dict[str, Shaped[Tensor, "..."]]:
        """`dense` quantized to this module's parameters; see `pack`."""
        return pack(dense, self.storage, empty)

    def dense_weight(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The weight as a matrix of `dtype`."""
        match self.storage:
            case "plain":
                return self.weight.to(dtype)
            case "fp8":
                assert self.weight_scale_inv is not None and self.block is not None
                return dequantize_blocks(self.weight, self.weight_scale_inv, self.block, dtype)
            case "fp8_rows":
                assert self.weight_scale is not None
                return dequantize_fp8_rows(self.weight, self.weight_scale, dtype)
            case "int8" | "int4" | "int8_rows":
                parts = dict(self.named_parameters(recurse=False))
                rows = slice(0, self.out_features)
                return unpack_rows(parts, self.storage, rows, self.in_features, dtype)
            case "gguf":
                assert self.gguf_type is not None
                own = gguf_blocks.dequantize_blocks(
                    self.weight, self.gguf_type, dtype, interleaved_rows=self.interleaved_rows
                )
                return own if self.weight_keys is None else self._with_keys(own, dtype)

    @property
    def interleaved_rows(self) -> int | None:
        """Rows of `weight` if it is interleaved; None: it is in file order."""
        if not self.is_interleaved:
            return None
        return self.out_features if self.weight_keys is None else len(self.weight)

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dense_weight(x.dtype), bias)

    def _with_keys(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """The matrix from its values' rows and the keys' half."""
        assert self.weight_keys is not None and self.keys_type is not None
        latent, heads = self.in_features, len(self.weight_keys) // self.in_features
        rows = len(self.weight_keys) if self.keys_interleaved else None
        keys = gguf_blocks.dequantize_blocks(
            self.weight_keys, self.keys_type, dtype, interleaved_rows=rows
        )
        keys, values = keys.unflatten(0, (heads, latent)), values.unflatten(0, (heads, -1))
        return torch.cat([keys.transpose(1, 2), values], dim=1).flatten(0, 1)

    def _unfilled(self, shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
        """A parameter without gradient: autograd does not support these types."""
        empty = torch.empty(shape, dtype=dtype, device=self.weight.device)
        return nn.Parameter(empty, requires_grad=False)


class RMSNorm(nn.Module):
    """RMSNorm with a learned weight, times a constant `factor`; computes in fp32."""

    def __init__(self, dim: int, eps: float, *, dtype: torch.dtype, factor: float = 1.0) -> None:
        super().__init__()
        self.eps = eps
        self.factor = factor
        self.weight = nn.Parameter(torch.empty(dim, dtype=dtype))

    def forward(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        return scaled(rms_norm(x, self.weight, self.eps), self.factor)


class LayerNorm(nn.Module):
    """LayerNorm with a learned weight and bias; computes in fp32."""

    def __init__(self, dim: int, eps: float, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, dtype=dtype))

    def forward(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        return layer_norm(x, self.weight, self.bias, self.eps)


class Embedding(nn.Module):
    """Token embedding, `weight` [vocab, hidden] or its rows in GGUF blocks, times a constant
    `factor`; without it, also the LM head of models with tied embeddings.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, *, dtype: torch.dtype, factor: float = 1.0
    ) -> None:
        super().__init__()
        self.factor = factor
        self.shape = (vocab_size, hidden_size)
        self.gguf_type: int | None = None
        self.is_interleaved = False
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size, dtype=dtype))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the embeddings, and so of the model's activations: bf16 for GGUF blocks."""
        return self.weight.dtype if self.gguf_type is None else torch.bfloat16

    def store_gguf(self, kind: int, *, interleaved: bool) -> None:
        """Replace the (still unfilled) weight by rows in blocks of GGUF type number `kind`, in the
        layouts of `Linear`.
        """
        self.gguf_type, self.is_interleaved = kind, interleaved
        shape = gguf_blocks.stored_shape(kind, *self.shape, interleaved)
        empty = torch.empty(shape, dtype=torch.uint8, device=self.weight.device)
        self.weight = nn.Parameter(empty, requires_grad=False)

    def dense_weight(self, dtype: torch.dtype) -> Float[Tensor, "vocab hidden"]:
        """The weight as a matrix of `dtype`."""
        if self.gguf_type is None:
            return self.weight.to(dtype)
        rows = self.shape[0] if self.is_interleaved else None
        return gguf_blocks.dequantize_blocks(
            self.weight, self.gguf_type, dtype, interleaved_rows=rows
        )

    def forward(self, ids: Int[Tensor, "tokens"]) -> Float[Tensor, "tokens hidden"]:
        return scaled(self._rows(ids), self.factor)

    def _rows(self, ids: Int[Tensor, "tokens"]) -> Float[Tensor, "tokens hidden"]:
        if self.gguf_type is None:
            return F.embedding(ids, self.weight)
        if self.is_interleaved:
            return self.dense_weight(self.dtype)[ids]
        return gguf_blocks.dequantize_blocks(self.weight[ids], self.gguf_type, self.dtype)


def scaled(x: Float[Tensor, "*rows dim"], factor: float) -> Float[Tensor, "*rows dim"]:
    """`x` times a constant of the model, which is 1 in most."""
    return x if factor == 1.0 else x * factor
