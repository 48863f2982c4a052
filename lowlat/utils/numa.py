"""Binding of a process to its part of the machine's NUMA nodes: threads by CPU affinity, memory by
set_mempolicy.
"""

import ctypes
import logging
import os
import platform
import sys
from collections.abc import Collection

from lowlat.utils.process_group import local_processes
from lowlat.utils.topology import Core, Topology, machine_topology

log = logging.getLogger(__name__)

SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}
"""Numbers of the system call, which glibc does not wrap."""
MPOL_BIND = 2


def bind_process(threads: int | None) -> int | None:
    """Bind this process of a torchrun launch to its part of the NUMA nodes, and return its cores;
    None if it stays unbound: on one node, or where the processes do not divide the nodes.

    Call it before threads start and memory is allocated, which inherit the binding. SMT siblings
    stay idle unless `threads` exceeds the cores: a decode step is bound by memory bandwidth, to
    which they add nothing.
    """
    topology = machine_topology()
    if len(topology.nodes) == 1 or sys.platform != "linux" or not _has_common_affinity():
        return None
    cores = own_cores(topology, int(os.environ.get("LOCAL_RANK", "0")), local_processes())
    cpus = {core.cpus[0] for core in cores}
    if threads is not None and threads > len(cpus):
        cpus = {cpu for core in cores for cpu in core.cpus}
    if len(cpus) < (threads or 1):
        log.warning(
            "%d processes on %d NUMA nodes with %d cores are not bound to nodes",
            local_processes(),
            len(topology.nodes),
            len(topology.cores),
        )
        return None
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        log.warning("threads are not bound to processors %s (%s)", sorted(cpus), error.strerror)
        return None
    bind_memory({core.node for core in cores})
    return len(cores)


def own_cores(topology: Topology, process: int, processes: int) -> tuple[Core, ...]:
    """The cores of one of `processes` processes: of its nodes, or of its part of a node; none if
    neither number divides the other.
    """
    nodes = topology.nodes
    per_node = max(1, processes // len(nodes))
    num_nodes = max(1, len(nodes) // processes)
    if processes * num_nodes != len(nodes) * per_node:
        return ()
    first = process // per_node * num_nodes
    own = [core for core in topology.cores if core.node in nodes[first : first + num_nodes]]
    size, part = len(own) // per_node, process % per_node
    return tuple(own[part * size : (part + 1) * size])


def bind_memory(nodes: Collection[int]) -> None:
    """Allocate the memory of this thread, and of those that it starts, on `nodes`: pages that are
    first touched, and pages of files that are first read. A warning if the system refuses, as
    containers do without CAP_SYS_NICE; Linux then prefers the node of the thread."""
    number = SET_MEMPOLICY.get(platform.machine())
    if number is None:
        return
    bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    words = (ctypes.c_ulong * (max(nodes) // bits + 1))()
    for node in nodes:
        words[node // bits] |= 1 << node % bits
    library = ctypes.CDLL(None, use_errno=True)
    # the kernel reads one bit less than this number
    if library.syscall(number, MPOL_BIND, words, ctypes.c_ulong(len(words) * bits + 1)):
        reason = os.strerror(ctypes.get_errno())
        log.warning("memory is not bound to NUMA nodes %s (%s)", sorted(nodes), reason)


def _has_common_affinity() -> bool:
    """Whether the launcher runs on the same processors. If not, it has bound each process."""
    try:
        return os.sched_getaffinity(os.getppid()) == os.sched_getaffinity(0)
    except OSError:  # the parent is in another container
        return True
