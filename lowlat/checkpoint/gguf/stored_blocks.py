"""Keep weights in the blocks of their GGUF file: gives the modules of a model the file's types.

Matrices of whole rows stay views of the memory-mapped file. Rows of llama's q and k are permuted
into a copy of the same size. Attention of exactly converted models is excluded: its padding lies
inside blocks.
"""

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from lowlat.checkpoint.gguf.source import GGUFBlocks, GGUFSource
from lowlat.checkpoint.mapping_operations import Operation, Rename
from lowlat.config.model import MLAConfig
from lowlat.model.linear import Embedding, Linear
from lowlat.model.mla import MLA

Readers = Mapping[str, Callable[[], Tensor]]
"""Parameter -> function that reads its blocks."""

_WEIGHT = ".weight"
_UP_PROJECTION = "self_attn.kv_b_proj"


def store_blocks(model: nn.Module, plan: Iterable[Operation], source: GGUFSource) -> Readers:
    """Give every unfilled projection and embedding of `model` that `source` stores in blocks this
    storage. Returns how its parameters are read.
    """
    readers: dict[str, Callable[[], Tensor]] = {}
    for step in plan:
        if not isinstance(step, Rename) or not step.parameter.endswith(_WEIGHT):
            continue
        path = step.parameter.removesuffix(_WEIGHT)
        module = model.get_submodule(path)
        if not isinstance(module, Linear | Embedding):
            continue
        blocks = source.blocks(step.file)
        if blocks is not None:
            module.store_gguf(blocks.kind)
            readers[step.parameter] = blocks.rows
        elif path.endswith(_UP_PROJECTION) and isinstance(module, Linear):
            halves = source.kv_b_halves(step.file)
            attention = model.get_submodule(path.rpartition(".")[0])
            if halves is not None and isinstance(attention, MLA):
                readers |= _store_halves(module, path, attention.dims, *halves)
    return readers


def _store_halves(
    module: Linear, path: str, dims: MLAConfig, keys: GGUFBlocks, values: GGUFBlocks
) -> Readers:
    module.store_gguf_heads(keys.kind, values.kind, dims.num_attention_heads, dims.qk_nope_head_dim)
    return {f"{path}{_WEIGHT}": values.rows, f"{path}{_WEIGHT}_keys": keys.rows}
