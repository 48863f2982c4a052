"""Keep weights in the blocks of their GGUF file: gives the modules of a model the file's types.

Rows stay views of the memory-mapped file, with two exceptions that are copies of the same size: the
permuted rows of llama's q and k, and on AVX-512 types that are faster interleaved, if all weights
fit into memory. Attention of exactly converted models is excluded: its padding lies inside blocks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lowlat.checkpoint.gguf.source import GGUFBlocks, blocks_of
from lowlat.checkpoint.mapping_operations import Operation, Rename
from lowlat.checkpoint.tensor_source import StoredTensor, TensorSource
from lowlat.config.model import MLAConfig
from lowlat.model.linear import Embedding, Linear
from lowlat.model.mla import MLA
from lowlat.model.transformer import Transformer
from lowlat.ops.gguf_blocks import can_interleave, interleave, row_bytes
from lowlat.ops.quantized import Empty
from lowlat.utils.huge_pages import HugePageAllocator
from lowlat.utils.memory import is_larger_than_memory
from lowlat.utils.progress import Progress

Readers = Mapping[str, Callable[[], Tensor]]
"""Parameter -> function that reads its blocks."""

_WEIGHT = ".weight"


def store_blocks(model: Transformer, plan: Sequence[Operation], source: TensorSource) -> Readers:
    """Give every unfilled projection and embedding of `model` that `source` has in blocks this
    storage. Returns how its parameters are read.
    """
    in_memory = not is_larger_than_memory(_weight_bytes(source))
    readers: dict[str, Callable[[], Tensor]] = {}
    empty = HugePageAllocator().empty
    for step in plan:
        if not isinstance(step, Rename) or not step.parameter.endswith(_WEIGHT):
            continue
        path = step.parameter.removesuffix(_WEIGHT)
        module = model.get_submodule(path)
        match blocks_of(source.tensors[step.file]):
            case (whole,) if isinstance(module, Linear | Embedding):
                # MLA's up-projections are read by heads, untied embeddings by tokens.
                is_product = isinstance(module, Linear) or model.lm_head is None
                is_product = is_product and not path.endswith("kv_b_proj")
                interleaved = in_memory and is_product and can_interleave(whole.kind)
                module.store_gguf(whole.kind, interleaved=interleaved)
                stored = source.tensors[step.file]
                read = partial(_interleaved, whole, stored, empty) if interleaved else whole.rows
                readers[step.parameter] = read
            case (keys, values) if isinstance(module, Linear):
                attention = model.get_submodule(path.rpartition(".")[0])
                assert isinstance(attention, MLA)
                readers |= _store_halves(module, path, attention.dims, keys, values)
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


def _weight_bytes(source: TensorSource) -> int:
    """Bytes of all weights: matrices in blocks as stored, the others and MLA's up-projections in
    bf16.
    """
    total = 0
    for tensor in source.tensors.values():
        match blocks_of(tensor):
            case (whole,):
                total += tensor.shape[0] * row_bytes(whole.kind, tensor.shape[1])
            case _:
                total += math.prod(tensor.shape) * torch.bfloat16.itemsize
    return total


def _interleaved(blocks: GGUFBlocks, stored: StoredTensor, empty: Empty) -> Tensor:
    rows = interleave(blocks.rows(), blocks.kind, empty)
    stored.release()
    return rows


def _store_halves(
    module: Linear, path: str, dims: MLAConfig, keys: GGUFBlocks, values: GGUFBlocks
) -> Readers:
    module.store_gguf_heads(keys.kind, values.kind, dims.num_attention_heads, dims.qk_nope_head_dim)
    return {f"{path}{_WEIGHT}": values.rows, f"{path}{_WEIGHT}_keys": keys.rows}
