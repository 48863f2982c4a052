"""`--parallel auto`: one process per NUMA node of this machine, started as torchrun does."""

import logging
import math
import sys
import tempfile
import uuid

from lowlat.config.serving_layout import AUTO
from lowlat.utils.process_group import is_launched, started_processes
from lowlat.utils.topology import machine_topology

STOP_SECONDS = 30
"""Time for processes to end after a signal, beyond that for draining."""


def one_process_per_node(
    parallel: str | None, *, drain_seconds: float = 0.0, option: str = "--parallel auto"
) -> str | None:
    """Start this command in one process per NUMA node if `parallel` is AUTO, and exit with its
    code. Returns `parallel` in processes of torchrun, and None for AUTO in a single process.
    drain_seconds: how long the command may run after SIGTERM. option: what asks for it.
    """
    if parallel != AUTO:
        return parallel
    if is_launched():
        return parallel if started_processes() > 1 else None
    topology = machine_topology()
    count = len(topology.nodes)
    if count == 1:
        print(f"lowlat: {option}: {topology}, so one process", file=sys.stderr)
        return None
    print(f"lowlat: {option}: {topology}, so {count} processes", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="lowlat-") as folder:
        stop_seconds = math.ceil(drain_seconds) + STOP_SECONDS
        sys.exit(_launch(count, sys.argv[1:], folder, stop_seconds))


def _launch(processes: int, arguments: list[str], folder: str, stop_seconds: int) -> int:
    """Exit code of `lowlat *arguments` in this many processes. The rendezvous, which unpickles what
    others write, is a file in `folder`, private to this user, instead of a port.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # the process that failed has said why
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint=f"{folder}/rendezvous",
        rdzv_configs={"store_type": "file"},
        local_addr="127.0.0.1",
        max_restarts=0,
        shutdown_timeout=stop_seconds,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "lowlat", *arguments)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException as signal:
        return 128 + signal.sigval
    return 0
