"""Process group of a torchrun launch: start, error propagation and shutdown of all processes of a
run.
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

from lowlat.train.parallel.mesh import ProcessMesh
from lowlat.train.recipe.schema import ParallelConfig
from lowlat.utils.errors import UserError

TIMEOUT = timedelta(hours=2)
"""Communication timeout: processes wait while rank 0 verifies data or writes a checkpoint. Dead
processes are detected immediately.
"""

SETTLING = 0.2
"""Seconds for gloo's threads to release their last tensors. A thread that frees a tensor while the
interpreter shuts down aborts the process, and groups referenced by a mesh retain their threads.
"""

_REPORTS = "lowlat/reports"


@contextmanager
def process_mesh(
    parallel: ParallelConfig, *, device: str = "cpu", origin: str = "recipe"
) -> Iterator[ProcessMesh]:
    """Context manager of the process mesh of a run; `origin` names the recipe in errors.

    An error in one process ends all: the process that fails first raises it, the others, whose
    communication fails, exit silently with code 1. Raises UserError if the number of processes is
    not that of the recipe, or if another process was killed.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != parallel.processes and int(os.environ.get("RANK", "0")):
        raise SystemExit(1)  # rank 0 prints the reason
    if world != parallel.processes:
        raise UserError(
            f"{origin}: [parallel] is for {parallel.processes} processes, {world} started; start "
            f"it as: torchrun --nproc-per-node {parallel.processes} --no-python lowlat train ..."
        )
    if world == 1:
        yield ProcessMesh()
        return
    store, rank, world = next(rendezvous("env://"))
    backend = "gloo"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=TIMEOUT, world_size=world, rank=rank, store=store)
    try:
        yield ProcessMesh(parallel, device)
    except Exception as error:
        if not _is_first_report(store):
            raise SystemExit(1) from None
        if _is_lost_peer(error):
            raise UserError(
                f"process {rank} of {world}: another process of the run has died; start all of "
                "them again to resume from the last checkpoint"
            ) from error
        raise
    finally:
        dist.destroy_process_group()
        time.sleep(SETTLING)


def _is_first_report(store: Store) -> bool:
    """Whether no other process has failed before; false if the store ended with its owner."""
    try:
        return store.add(_REPORTS, 1) == 1
    except RuntimeError:
        return False


def _is_lost_peer(error: Exception) -> bool:
    """Whether `error` is a lost connection; gloo has no exception type for it."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "/gloo/transport/" in str(error)
    )
