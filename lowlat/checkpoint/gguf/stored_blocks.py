"""Keep weights in the blocks of their GGUF file: gives the modules of a model the file's types.

Matrices of whole rows stay views of the memory-mapped file. Rows of llama's q and k are permuted
into a copy of the same size. Attention of exactly converted models is excluded: its padding lies
inside blocks.
"""

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from lowlat.checkpoint.gguf.source import GGUFBlocks, blocks_of
from lowlat.checkpoint.mapping_operations import Operation, Rename
from lowlat.checkpoint.tensor_source import TensorSource
from lowlat.config.model import MLAConfig
from lowlat.model.linear import Embedding, Linear
from lowlat.model.mla import MLA

Readers = Mapping[str, Callable[[], Tensor]]
"""Parameter -> function that reads its blocks."""

_WEIGHT = ".weight"


def store_blocks(model: nn.Module, plan: Iterable[Operation], source: TensorSource) -> Readers:
    """Give every unfilled projection and embedding of `model` that `source` has in blocks this
    storage. Returns how its parameters are read.
    """
    readers: dict[str, Callable[[], Tensor]] = {}
    for step in plan:
        if not isinstance(step, Rename) or not step.parameter.endswith(_WEIGHT):
            continue
        path = step.parameter.removesuffix(_WEIGHT)
        module = model.get_submodule(path)
        match blocks_of(source.tensors[step.file]):
            case (whole,) if isinstance(module, Linear | Embedding):
                module.store_gguf(whole.kind)
                readers[step.parameter] = whole.rows
            case (keys, values) if isinstance(module, Linear):
                attention = model.get_submodule(path.rpartition(".")[0])
                assert isinstance(attention, MLA)
                readers |= _store_halves(module, path, attention.dims, keys, values)
    return readers


def _store_halves(
    module: Linear, path: str, dims: MLAConfig, keys: GGUFBlocks, values: GGUFBlocks
) -> Readers:
    module.store_gguf_heads(keys.kind, values.kind, dims.num_attention_heads, dims.qk_nope_head_dim)
    return {f"{path}{_WEIGHT}": values.rows, f"{path}{_WEIGHT}_keys": keys.rows}
