"""Binding to NUMA nodes: cores of each process, and affinity and memory policy of this one."""

import os
import sys
from pathlib import Path

import pytest

from lowlat.utils import numa
from lowlat.utils.numa import bind_memory, bind_process, own_cores
from lowlat.utils.topology import Core, Topology

linux = pytest.mark.skipif(sys.platform != "linux", reason="affinity and memory policy of Linux")


def topology(nodes: int, cores: int) -> Topology:
    """Cores with two SMT siblings each."""
    total = nodes * cores
    return Topology(cores=tuple(Core(node=n // cores, cpus=(n, n + total)) for n in range(total)))


@pytest.mark.parametrize(
    ("nodes", "processes", "first"),
    [
        (2, 2, [(0, 1, 2, 3), (4, 5, 6, 7)]),
        (2, 4, [(0, 1), (2, 3), (4, 5), (6, 7)]),
        (4, 2, [tuple(range(8)), tuple(range(8, 16))]),
        (2, 1, [tuple(range(8))]),
        (2, 3, [(), (), ()]),
        (4, 6, [()] * 6),
        (2, 16, [()] * 16),
    ],
)
def test_cores_of_each_process(nodes: int, processes: int, first: list[tuple[int, ...]]):
    """Every core in one process at most, and no process on nodes of another one."""
    machine = topology(nodes, 4)
    each = [own_cores(machine, process, processes) for process in range(processes)]
    assert [tuple(core.cpus[0] for core in cores) for cores in each] == first


@linux
@pytest.mark.parametrize(
    ("threads", "cores", "cpus"), [(None, 2, {4, 5}), (2, 2, {4, 5}), (3, 2, {4, 5, 12, 13})]
)
def test_siblings_stay_idle_unless_asked_for(
    threads: int | None, cores: int, cpus: set[int], monkeypatch: pytest.MonkeyPatch
):
    bound: list[set[int]] = []
    monkeypatch.setattr(numa, "machine_topology", lambda: topology(2, 4))
    monkeypatch.setattr(numa, "bind_memory", bound.append)
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, given: bound.append(given))
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert bind_process(threads) == cores
    assert bound == [cpus, {1}]


def test_one_node_is_not_bound(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(numa, "machine_topology", lambda: topology(1, 4))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert bind_process(None) is None


@linux
def test_more_threads_than_processors_are_not_bound(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(numa, "machine_topology", lambda: topology(2, 4))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert bind_process(9) is None
    assert "are not bound" in caplog.text


@linux
def test_memory_policy_of_a_child(tmp_path: Path):
    """The kernel lists the policy of each mapping."""
    nodes = Path("/sys/devices/system/node/online")
    if not nodes.exists() or not Path("/proc/self/numa_maps").exists():
        pytest.skip("a kernel without NUMA")
    child = os.fork()
    if child == 0:
        bind_memory({0})
        (tmp_path / "maps").write_text(Path("/proc/self/numa_maps").read_text())
        os._exit(0)
    os.waitpid(child, 0)
    assert "bind:0" in (tmp_path / "maps").read_text()
