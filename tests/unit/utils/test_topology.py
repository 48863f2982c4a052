"""Topology from a folder with the files of /sys and /proc of other machines."""

from pathlib import Path

import pytest

from lowlat.utils.errors import UserError
from lowlat.utils.topology import Core, machine_topology, parse_cpu_list, read_topology


def machine(
    root: Path, *, nodes: int = 2, cores: int = 2, smt: int = 2, allowed: str = "", cpuset: str = ""
) -> Path:
    """A server that numbers the second SMT siblings after all cores, as Linux does."""
    total = nodes * cores
    files = {
        "proc/self/status": f"Name:\tx\nCpus_allowed_list:\t{allowed or f'0-{total * smt - 1}'}\n"
    }
    for node in range(nodes):
        first = node * cores
        ranges = [f"{first + total * way}-{first + total * way + cores - 1}" for way in range(smt)]
        files[f"sys/devices/system/node/node{node}/cpulist"] = ",".join(ranges) + "\n"
    for cpu in range(total * smt):
        siblings = ",".join(str(cpu % total + total * way) for way in range(smt))
        files[f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"] = siblings + "\n"
    if cpuset:
        files["proc/self/cgroup"] = "0::/box\n"
        files["sys/fs/cgroup/box/cpuset.cpus.effective"] = cpuset + "\n"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_two_sockets_with_smt(tmp_path: Path):
    found = read_topology(machine(tmp_path))
    assert found.cores == (
        Core(node=0, cpus=(0, 4)),
        Core(node=0, cpus=(1, 5)),
        Core(node=1, cpus=(2, 6)),
        Core(node=1, cpus=(3, 7)),
    )
    assert found.nodes == (0, 1)
    assert str(found) == "2 NUMA nodes, 4 cores, 8 SMT threads"


def test_affinity_and_cpuset_limit_it(tmp_path: Path):
    found = read_topology(machine(tmp_path / "a", allowed="0,4,2"))
    assert found.cores == (Core(node=0, cpus=(0, 4)), Core(node=1, cpus=(2,)))
    found = read_topology(machine(tmp_path / "b", allowed="0-3", cpuset="2-3,6-7"))
    assert found.cpus == (2, 3)
    assert found.nodes == (1,)


def test_cpusets_of_cgroup_v1(tmp_path: Path):
    """Its effective processors, or without them those that it lists."""
    root = machine(tmp_path, allowed="0-3")
    (root / "proc/self/cgroup").write_text("4:cpuset:/box\n")
    folder = root / "sys/fs/cgroup/cpuset/box"
    folder.mkdir(parents=True)
    (folder / "cpuset.cpus").write_text("1-2\n")
    assert read_topology(root).cpus == (1, 2)
    (folder / "cpuset.effective_cpus").write_text("2\n")
    assert read_topology(root).cpus == (2,)


def test_a_container_without_sys(tmp_path: Path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text("Cpus_allowed_list:\t1-2\n")
    found = read_topology(tmp_path)
    assert found.cores == (Core(node=0, cpus=(1,)), Core(node=0, cpus=(2,)))


def test_a_file_of_lscpu_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "cpus"
    file.write_text("# CPU,CORE,NODE\n0,0,0\n1,1,1\n2,0,0\n3,1,1\n")
    monkeypatch.setenv("LOWLAT_TOPOLOGY", str(file))
    assert machine_topology().cores == (Core(node=0, cpus=(0, 2)), Core(node=1, cpus=(1, 3)))
    file.write_text("0,0,\n")
    assert machine_topology().nodes == (0,)
    for text in ("", "a,b,c\n", "0,0\n"):
        file.write_text(text)
        with pytest.raises(UserError, match=r"LOWLAT_TOPOLOGY=.*cpus: "):
            machine_topology()


def test_this_machine():
    found = read_topology()
    assert found.cpus and len(found.cores) <= len(found.cpus)


@pytest.mark.parametrize(
    ("text", "cpus"), [("", []), ("3", [3]), ("0-2,8", [0, 1, 2, 8]), ("1, 4-5\n", [1, 4, 5])]
)
def test_lists_of_processors(text: str, cpus: list[int]):
    assert parse_cpu_list(text) == cpus
