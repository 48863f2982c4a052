"""Sharded checkpoint of a Hugging Face folder: file names, the index, and their planned layout."""

import json
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from lowlat.checkpoint.file_layout import FileLayout, Pieces, lay_out
from lowlat.checkpoint.safetensors.writer import PYTORCH, TensorSpec, encode_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
"""Largest shard (max_shard_size in transformers); a larger group gets a shard of its own."""


class TensorGroup(NamedTuple):
    """Tensors that are computed together; their bytes are contiguous in a file."""

    tensors: tuple[TensorSpec, ...]
    """In file order."""
    pieces: Pieces
    """Makes their bytes."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def shard_names(count: int) -> list[str]:
    """File names of `count` shards, as transformers writes them."""
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def encode_index(weight_map: Mapping[str, str], total_bytes: int) -> bytes:
    """Content of the index: the shard of every tensor."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    return (json.dumps(index, indent=2) + "\n").encode()


def plan_shards(
    groups: Iterable[TensorGroup], max_shard_bytes: int = MAX_SHARD_BYTES
) -> tuple[list[FileLayout], bytes | None]:
    """Layout of a checkpoint's shards, and the content of their index if there are several.

    A shard ends before the group that would make it larger than `max_shard_bytes`.
    """
    shards: list[list[TensorGroup]] = [[]]
    sizes = [0]
    for group in groups:
        if shards[-1] and sizes[-1] + group.nbytes > max_shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(group)
        sizes[-1] += group.nbytes
    names = shard_names(len(shards))
    files = [
        lay_out(
            name,
            encode_header((tensor for group in shard for tensor in group.tensors), PYTORCH),
            [(group.tensors[0].name, group.nbytes, group.pieces) for group in shard],
        )
        for name, shard in zip(names, shards, strict=True)
    ]
    if len(shards) == 1:
        return files, None
    weight_map = {
        tensor.name: name
        for name, shard in zip(names, shards, strict=True)
        for group in shard
        for tensor in group.tensors
    }
    return files, encode_index(weight_map, sum(sizes))
