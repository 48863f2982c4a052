"""This process's part of a micro-batch: its tokens, their positions, and the attention backend that
sees the rest of the sequence.
"""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from lowlat.attention.base import AttentionBackend
from lowlat.attention.flash import FlashAttention
from lowlat.data.batch import Batch
from lowlat.train.layers.indexed_attention import IndexedAttention, KeyRange, OtherProcesses
from lowlat.train.parallel.collectives import all_reduced, copy_to_group
from lowlat.train.parallel.context import ContextAttention, Zigzag
from lowlat.train.parallel.mesh import ProcessMesh
from lowlat.train.parallel.tensor import TensorParallelAttention


class LocalBatch(NamedTuple):
    """A micro-batch on one process."""

    batch: Batch
    """Its tokens; with context parallelism chunks of sequences, as sequences of their own."""
    attention: AttentionBackend
    positions: Int[Tensor, "tokens"]


def local_batch(
    mesh: ProcessMesh, batch: Batch, num_ahead: int, *, is_sparse: bool = False
) -> LocalBatch:
    """This process's part of `batch`, which the processes along context and tensor share.
    num_ahead = 1 + number of MTP modules; is_sparse: whether the model has indexers (DSA).
    """
    device: torch.device = batch.tokens.device
    if mesh.size("context") > 1:
        length = batch.sequence_length(num_ahead)
        documents = batch.documents or ((length,),) * batch.rows
        zigzag = Zigzag(mesh.size("context"), mesh.local_rank("context"))
        attention = ContextAttention(documents, zigzag, mesh.group("context"))
        batch = zigzag.divide(batch, num_ahead)
        ranges, others = attention.key_ranges(), OtherProcesses(gather=attention.gather)
    else:
        attention = FlashAttention(batch.lengths(num_ahead))
        ranges, others = _documents(attention.lengths), OtherProcesses()
    positions = attention.positions(device)
    if mesh.size("tensor") > 1:
        group = mesh.group("tensor")
        attention = TensorParallelAttention(attention, group)
        copy = partial(copy_to_group, group=group)
        others = others._replace(copy=copy, sum_heads=partial(all_reduced, group=group))
    if is_sparse:
        attention = IndexedAttention(attention, ranges, others)
    return LocalBatch(batch, attention, positions)


def _documents(lengths: Sequence[int]) -> list[KeyRange]:
    bounds = pairwise(accumulate(lengths, initial=0))
    return [KeyRange(start, start, end) for start, end in bounds]
