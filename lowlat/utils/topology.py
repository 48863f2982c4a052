"""Topology of this machine: NUMA nodes, cores and SMT siblings that this process may use, from
/sys/devices/system, its CPU affinity and its cgroup's cpuset, or from a file of lscpu.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from lowlat.utils.cgroups import group_folders
from lowlat.utils.errors import UserError
from lowlat.utils.formatting import counted

ROOT = Path("/")
VARIABLE = "LOWLAT_TOPOLOGY"
"""Environment variable with the file that stands in for this machine."""
COLUMNS = "CPU,CORE,NODE"
"""Columns of that file, the output of `lscpu --parse=CPU,CORE,NODE`."""
CPUSETS = ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus")
"""Files of a cpuset, preferred first: of cgroup v2, of v1, and of v1 where only the requested
processors are listed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Core:
    """A physical core."""

    node: int
    """NUMA node whose memory is local."""
    cpus: tuple[int, ...]
    """Its processors that the process may use: SMT siblings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """Cores that the process may use, by node and number."""

    cores: tuple[Core, ...]

    @property
    def nodes(self) -> tuple[int, ...]:
        """NUMA nodes with a usable core."""
        return tuple(sorted({core.node for core in self.cores}))

    @property
    def cpus(self) -> tuple[int, ...]:
        """All usable processors."""
        return tuple(sorted(cpu for core in self.cores for cpu in core.cpus))

    def __str__(self) -> str:
        nodes, cores, cpus = len(self.nodes), len(self.cores), len(self.cpus)
        parts = [counted(nodes, "NUMA node"), counted(cores, "core")]
        return ", ".join(parts + ([f"{cpus} SMT threads"] if cpus > cores else []))


def machine_topology() -> Topology:
    """The topology of this machine, or of the file that LOWLAT_TOPOLOGY names. Raises UserError for
    a file of another format.
    """
    file = os.environ.get(VARIABLE)
    return read_lscpu(Path(file)) if file else read_topology()


def read_lscpu(file: Path) -> Topology:
    """The topology in a file of `lscpu --parse=CPU,CORE,NODE`. Raises UserError for others."""
    cores: dict[tuple[int, int], list[int]] = {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        for line in lines:
            if line and not line.startswith("#"):
                cpu, core, node = line.split(",")
                # without NUMA the column is empty
                cores.setdefault((int(node or 0), int(core)), []).append(int(cpu))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{VARIABLE}={file}: not a topology ({error}); write it with lscpu --parse={COLUMNS}"
        ) from error
    if not cores:
        raise UserError(f"{VARIABLE}={file}: lists no processor")
    return Topology(
        cores=tuple(
            Core(node=node, cpus=tuple(sorted(cpus))) for (node, _), cpus in sorted(cores.items())
        )
    )


def read_topology(root: Path = ROOT) -> Topology:
    """The topology below `root`, the folder of proc and sys. Without /sys, every processor is a
    core of node 0.
    """
    system = root / "sys/devices/system"
    allowed = _allowed(root)
    node_of = {
        cpu: int(folder.name.removeprefix("node"))
        for folder in sorted((system / "node").glob("node[0-9]*"))
        for cpu in parse_cpu_list(_read(folder / "cpulist"))
    }
    cores: dict[tuple[int, ...], list[int]] = {}
    for cpu in sorted(allowed):
        siblings = _read(system / f"cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.setdefault(tuple(parse_cpu_list(siblings)) or (cpu,), []).append(cpu)
    found = [Core(node=node_of.get(cpus[0], 0), cpus=tuple(cpus)) for cpus in cores.values()]
    return Topology(cores=tuple(sorted(found, key=lambda core: (core.node, core.cpus))))


def parse_cpu_list(text: str) -> list[int]:
    """`"0-3,8"` -> [0, 1, 2, 3, 8], the format of /sys and cpusets."""
    found: list[int] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, _, last = part.partition("-")
        found.extend(range(int(first), int(last or first) + 1))
    return found


def _allowed(root: Path) -> set[int]:
    """Processors of the process's affinity that all of its cpusets contain."""
    if root == ROOT and sys.platform == "linux":
        allowed = os.sched_getaffinity(0)
    else:
        allowed = _listed_affinity(root) or set(range(os.cpu_count() or 1))
    for folder in group_folders("cpuset", root):
        own = next(filter(None, (_read(folder / name) for name in CPUSETS)), "")
        allowed = allowed & set(parse_cpu_list(own)) or allowed
    return allowed


def _listed_affinity(root: Path) -> set[int]:
    """Cpus_allowed_list of /proc/self/status."""
    for line in _read(root / "proc/self/status").splitlines():
        name, _, value = line.partition(":")
        if name == "Cpus_allowed_list":
            return set(parse_cpu_list(value))
    return set()


def _read(file: Path) -> str:
    """The text of a file; empty where it does not exist, as in some containers."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
