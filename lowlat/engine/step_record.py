"""Step records of parallel serving: rank 0 sends every model call to the other ranks, as integers
(kind, number of KV cache pages, chunks of the step).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import get_args

import torch
from jaxtyping import Int
from torch import Tensor

from lowlat.attention.path import AttentionPath
from lowlat.engine.request import Chunk

PATHS: tuple[AttentionPath, ...] = get_args(AttentionPath)


class RecordKind(IntEnum):
    """What to do."""

    STEP = 0
    MTP = 1
    COPY_PAGE = 2
    EXPORT_PAGE = 3
    IMPORT_PAGE = 4
    DIGEST = 5
    STATS = 6
    REBALANCE = 7
    LOADS = 8
    END = 9


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One action of the leader's model runner."""

    kind: RecordKind
    num_pages: int = 0
    """Pages of the KV cache."""
    numbers: tuple[int, ...] = ()
    """Depth of an MTP module, or pages."""
    chunks: Sequence[Chunk] = ()

    def encode(self) -> Int[Tensor, " length"]:
        """As integers."""
        values = [self.kind, self.num_pages, len(self.numbers), *self.numbers, len(self.chunks)]
        for chunk in self.chunks:
            path = PATHS.index(chunk.path)
            values += [chunk.start, chunk.num_logits, path, chunk.lora_int_id]
            values += [len(chunk.tokens), *chunk.tokens, len(chunk.pages), *chunk.pages]
        return torch.tensor(values, dtype=torch.int64)

    @classmethod
    def decode(cls, record: Int[Tensor, " length"]) -> "StepRecord":
        """The record that `encode` gave."""
        values = iter(record.tolist())
        kind, num_pages = RecordKind(next(values)), next(values)
        numbers = tuple(_list(values))
        chunks = [_chunk(values) for _ in range(next(values))]
        return cls(kind=kind, num_pages=num_pages, numbers=numbers, chunks=chunks)


def _chunk(values: Iterator[int]) -> Chunk:
    start, num_logits, path, lora_int_id = (next(values) for _ in range(4))
    tokens = _list(values)
    return Chunk(
        tokens=tokens,
        start=start,
        pages=tuple(_list(values)),
        num_logits=num_logits,
        path=PATHS[path],
        lora_int_id=lora_int_id,
    )


def _list(values: Iterator[int]) -> list[int]:
    return [next(values) for _ in range(next(values))]
