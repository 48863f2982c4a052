"""Load quantized weights without requantizing: modules get the storage types of the file.

GGUF blocks and fp8 rows stay views of the memory-mapped file, with two exceptions that are copies
of the same size: the permuted rows of llama's q and k, and on AVX-512 types that are faster
interleaved, if all weights fit into memory. 4-bit weights of safetensors files are always copied,
into blocks. Attention of exactly converted models is excluded: its padding lies inside blocks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lowlat.checkpoint.mapping_operations import Operation, Rename
from lowlat.checkpoint.tensor_source import Blocks, ScaledRows, StoredTensor, TensorSource
from lowlat.config.model import MLAConfig
from lowlat.model.linear import Embedding, Linear
from lowlat.model.mla import MLA
from lowlat.ops.gguf_blocks import can_interleave, interleave, row_bytes
from lowlat.ops.quantized import TILE, Empty
from lowlat.utils.errors import UserError
from lowlat.utils.huge_pages import HugePageAllocator
from lowlat.utils.memory import is_larger_than_memory, memory_limit
from lowlat.utils.progress import Progress

Readers = Mapping[str, Callable[[], Tensor]]
"""Parameter -> function that reads its blocks."""

_WEIGHT = ".weight"


def store_blocks(
    model: nn.Module,
    plan: Sequence[Operation],
    source: TensorSource,
    *,
    part: float = 1.0,
    has_head: bool = True,
) -> Readers:
    """Give every unfilled projection and embedding of `model` that `source` has quantized this
    storage. Returns how its parameters are read. Raises UserError if they must be copied and do not
    fit into memory. part: share of all weights that `plan` reads. has_head: whether the embedding
    is not the head, too.
    """
    size = int(stored_bytes(source) * part)
    in_memory = not is_larger_than_memory(size)
    readers: dict[str, Callable[[], Tensor]] = {}
    empty = HugePageAllocator().empty
    for step in plan:
        if not isinstance(step, Rename) or not step.parameter.endswith(_WEIGHT):
            continue
        path = step.parameter.removesuffix(_WEIGHT)
        module = model.get_submodule(path)
        stored = source.tensors[step.file]
        match stored.quantized():
            case ScaledRows() as rows if isinstance(module, Linear):
                module.store_fp8_rows()
                readers[step.parameter] = partial(_part, module, rows.weight)
                readers[f"{step.parameter}_scale"] = partial(_part, module, rows.scale)
            case (whole,) if isinstance(module, Linear | Embedding):
                if not (whole.in_file or in_memory):
                    raise _too_large(source, size)
                # untied embeddings are read by tokens
                is_product = isinstance(module, Linear) or not has_head
                interleaved = in_memory and is_product and can_interleave(whole.kind)
                if interleaved and path.endswith("kv_b_proj"):
                    attention = model.get_submodule(path.rpartition(".")[0])
                    interleaved = isinstance(attention, MLA) and _has_tiles(
                        math.gcd(attention.dims.qk_nope_head_dim, attention.dims.v_head_dim)
                    )
                module.store_gguf(whole.kind, interleaved=interleaved)
                own = module.part if isinstance(module, Linear) else slice(None)
                readers[step.parameter] = partial(_rows, whole, stored, own, interleaved, empty)
            case (keys, values) if isinstance(module, Linear):
                dims = _mla_of(model, path).dims
                halves = keys, values
                readers |= _store_halves(module, path, dims, stored, halves, in_memory, empty)
    return readers


def read_blocks(
    readers: Readers, parameters: Mapping[str, Tensor], progress: Progress
) -> dict[str, Tensor]:
    """The parameters of `readers`; the time goes into those that are interleaved."""
    if not readers:
        return {}
    total = sum(parameters[name].nbytes for name in readers)
    filled: dict[str, Tensor] = {}
    with progress.task("Loading weights in blocks", total=total, unit="bytes") as task:
        for name, read in readers.items():
            filled[name] = read()
            task.advance(filled[name].nbytes)
    return filled


def stored_bytes(source: TensorSource) -> int:
    """Bytes of all weights in memory: quantized matrices as stored, the others and MLA's
    up-projections of two parts in bf16.
    """
    total = 0
    for tensor in source.tensors.values():
        match tensor.quantized():
            case (whole,):
                total += tensor.shape[0] * row_bytes(whole.kind, tensor.shape[1])
            case ScaledRows():
                total += math.prod(tensor.shape) + tensor.shape[0] * torch.float32.itemsize
            case _:
                total += math.prod(tensor.shape) * torch.bfloat16.itemsize
    return total


def _part(module: Linear, read: Callable[[], Tensor]) -> Tensor:
    return read()[module.part]


def _rows(
    blocks: Blocks, stored: StoredTensor, part: slice, interleaved: bool, empty: Empty
) -> Tensor:
    rows = blocks.rows()[part]
    if interleaved:
        rows = interleave(rows, blocks.kind, empty)
    if interleaved or not blocks.in_file:
        stored.release()
    return rows


def _too_large(source: TensorSource, size: int) -> UserError:
    return UserError(
        f"{source.path}: its 4-bit weights are copied, {size / 1e9:,.1f} GB of them, and "
        f"{memory_limit() / 1e9:,.1f} GB of memory are there; use a GGUF file, which is mapped"
    )


def _mla_of(model: nn.Module, path: str) -> MLA:
    """The attention of a projection."""
    attention = model.get_submodule(path.rpartition(".")[0])
    assert isinstance(attention, MLA)
    return attention


def _has_tiles(rows: int) -> bool:
    """Whether a head with `rows` is whole tiles: only such heads are parts of interleaved rows."""
    return rows % TILE == 0


def _store_halves(
    module: Linear,
    path: str,
    dims: MLAConfig,
    stored: StoredTensor,
    halves: tuple[Blocks, Blocks],
    in_memory: bool,
    empty: Empty,
) -> Readers:
    heads, nope_dim = dims.num_attention_heads, dims.qk_nope_head_dim
    sizes = module.in_features, dims.v_head_dim  # rows of a head
    keys, values = halves
    both = (
        in_memory and _has_tiles(sizes[0]) and can_interleave(keys.kind),
        in_memory and _has_tiles(sizes[1]) and can_interleave(values.kind),
    )
    module.store_gguf_heads(keys.kind, values.kind, heads, nope_dim, interleaved=both)
    first = (module.part.start or 0) // (nope_dim + dims.v_head_dim)
    names = f"{path}{_WEIGHT}_keys", f"{path}{_WEIGHT}"
    return {
        name: partial(
            _rows, half, stored, slice(first * size, (first + heads) * size), interleaved, empty
        )
        for name, half, size, interleaved in zip(names, halves, sizes, both, strict=True)
    }
