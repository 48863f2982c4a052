"""What one process computes of a micro-batch: its tokens, their positions, attention over them.

Owns the choice of attention; every loop over micro-batches starts here.
"""

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from lowlat.attention.base import AttentionBackend
from lowlat.attention.flash import FlashAttention
from lowlat.data.batch import Batch
from lowlat.train.parallel.context import ContextAttention, Zigzag
from lowlat.train.parallel.team import Team
from lowlat.train.parallel.tensor import SharedRows


class View(NamedTuple):
    """A micro-batch as one process sees it."""

    batch: Batch
    """Its tokens; with context parallelism parts of rows, as rows of their own."""
    attention: AttentionBackend
    positions: Int[Tensor, "tokens"]


def own_view(team: Team, batch: Batch, num_ahead: int) -> View:
    """This process's view of `batch`, which the processes along context and tensor share."""
    device: torch.device = batch.tokens.device
    if team.size("context") > 1:
        length = batch.sequence_length(num_ahead)
        documents = batch.documents or ((length,),) * batch.rows
        zigzag = Zigzag(team.size("context"), team.place("context"))
        attention = ContextAttention(documents, zigzag, team.group("context"))
        batch = zigzag.divide(batch, num_ahead)
    else:
        attention = FlashAttention(batch.lengths(num_ahead))
    positions = attention.positions(device)
    if team.size("tensor") > 1:
        attention = SharedRows(attention, team.group("tensor"))
    return View(batch, attention, positions)
