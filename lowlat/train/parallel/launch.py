"""Processes started by torchrun become a team, and end together.

Owns the process group and what a failure in one process does to the others.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from lowlat.train.parallel.team import Team
from lowlat.train.recipe.schema import ParallelConfig
from lowlat.utils.errors import UserError

PATIENCE = timedelta(hours=2)
"""How long processes wait for one another, as when the first verifies data or saves. Ones that died
are noticed at once.
"""

SETTLING = 0.2
"""Seconds for gloo's threads to drop the last tensors they moved. A group that a mesh still refers
to keeps its threads, and one that drops a tensor while the interpreter ends aborts the process.
"""

_REPORTS = "lowlat/reports"


@contextmanager
def joined(
    parallel: ParallelConfig, *, device: str = "cpu", origin: str = "recipe"
) -> Iterator[Team]:
    """The team of this process, for as long as the run lasts; `origin` names the recipe in errors.

    An error in one process ends them all: the one that fails first raises it, the others, whose
    messages to it fail, leave with exit code 1 and without a word. Raises UserError where the
    number of processes is not that of the recipe, and where another process was killed.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != parallel.processes and int(os.environ.get("RANK", "0")):
        raise SystemExit(1)  # the first process says why
    if world != parallel.processes:
        raise UserError(
            f"{origin}: [parallel] is for {parallel.processes} processes, {world} started; start "
            f"it as: torchrun --nproc-per-node {parallel.processes} --no-python lowlat train ..."
        )
    if world == 1:
        yield Team()
        return
    store, rank, world = next(rendezvous("env://"))
    backend = "gloo"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=PATIENCE, world_size=world, rank=rank, store=store)
    try:
        yield Team(parallel, device)
    except Exception as error:
        if not _is_first_report(store):
            raise SystemExit(1) from None
        if _is_lost_peer(error):
            raise UserError(
                f"process {rank} of {world}: another process of the run has died; start all of "
                "them again to go on from the last save"
            ) from error
        raise
    finally:
        dist.destroy_process_group()
        time.sleep(SETTLING)


def _is_first_report(store: Store) -> bool:
    """Whether no other process has failed before; also no where the store ended with its owner."""
    try:
        return store.add(_REPORTS, 1) == 1
    except RuntimeError:
        return False


def _is_lost_peer(error: Exception) -> bool:
    """Whether `error` is a message that did not arrive: gloo has no type of its own for that."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "/gloo/transport/" in str(error)
    )
