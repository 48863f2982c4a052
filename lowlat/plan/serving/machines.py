"""Machines that serve: sockets of CPU servers and GPUs with their memory bandwidth, FLOP/s and
links; presets, TOML tables, and clusters written `4xNAME`.

A device is what one rank runs on: a socket with its memory, or a GPU. Rates are published ones,
times the share of them that kernels reach.
"""

import re
import tomllib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lowlat.plan.job import Precision
from lowlat.plan.machine import H100, H800, Machine
from lowlat.plan.serving.step_cost import KernelRates
from lowlat.utils.errors import UserError
from lowlat.utils.memory import RESERVE

MOST_MACHINES = 4096
GIB = 2**30
HERE = "here"
"""Name of this machine, measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingMachine(Machine):
    """A device and its links, with latencies. `product_share` and `attention_share` are of forward
    passes."""

    devices: int = 1
    """Devices that one machine of a cluster has: sockets of a CPU server, 1 for GPUs."""
    decode_attention_share: float = 0.5
    """Share of the bf16 rate that attention reaches in decode steps."""
    node_latency: float = 5e-6
    """Seconds of a message within the node."""
    network_latency: float = 15e-6
    """Seconds of a message to another node."""
    layer_seconds: float = 20e-6
    """Seconds per layer that no rate explains: launches of kernels, barriers of threads."""

    def rates(self, dtype: str, *, decodes: bool) -> KernelRates:
        """What kernels reach with weights of `dtype`. Quantized weights are multiplied in bf16,
        fp8 in fp8 where the device has it."""
        plain = self.flops["fp32" if dtype == "fp32" else "bf16"]
        products = self.flops.get("fp8", plain) if dtype == "fp8" else plain
        scores = plain * (self.decode_attention_share if decodes else self.attention_share)
        return KernelRates(
            bandwidth=self.memory_bandwidth * self.memory_share,
            products=products * self.product_share,
            scores=scores,
            int8_scores=scores,
        )

    @property
    def assumed_shares(self) -> str:
        """The shares of the rates that kernels reach, in words."""
        return (
            f"kernels reach {self.memory_share:.0%} of memory bandwidth, {self.product_share:.0%} "
            f"of the FLOP/s in products, {self.decode_attention_share:.0%} in decode attention"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """`machines` equal machines."""

    machine: ServingMachine
    machines: int = 1

    @property
    def devices(self) -> int:
        return self.machines * self.machine.devices

    def __str__(self) -> str:
        return f"{self.machines} x {self.machine.name}"


def _gpu(machine: Machine, **changes: Any) -> ServingMachine:
    return replace(ServingMachine(**asdict(machine)), **{"attention_share": 0.5, **changes})


def _server(
    name: str,
    *,
    cores: int,
    ghz: int | float,
    per_cycle: int,
    gbs: int | float,
    gib: int = 768,
    amx: bool,
) -> ServingMachine:
    """A two-socket server. per_cycle: bf16 FLOPs per cycle and core; gbs, gib: per socket."""
    rate = cores * ghz * 1e9 * per_cycle
    machine = ServingMachine(
        name=name,
        memory_bytes=gib * GIB,
        reserve_bytes=RESERVE,
        devices=2,
        devices_per_node=2,
        flops={"bf16": rate, "fp32": rate / (16 if amx else 2)},
        memory_bandwidth=gbs * 1e9,
        node_bandwidth=50e9,
        network_bandwidth=6.25e9,
        node_latency=10e-6,
        network_latency=30e-6,
        layer_seconds=50e-6,
    )
    return replace(machine, **(AMX_SHARES if amx else AVX_SHARES))


AVX_SHARES = {
    "memory_share": 0.65,
    "product_share": 0.7,
    "attention_share": 0.6,
    "decode_attention_share": 0.65,
}
"""What lowlat's kernels reach on Zen 4 and 5 (docs/results/cpu.md). Memory: 80 % of the published
bandwidth can be read, of which decode reaches 80 %."""
AMX_SHARES = {
    "memory_share": 0.65,
    "product_share": 0.12,
    "attention_share": 0.06,
    "decode_attention_share": 0.04,
}
"""The same with AMX, whose published rate no program comes near."""

MACHINES = {
    machine.name: machine
    for machine in (
        _server("epyc-9654", cores=96, ghz=2.4, per_cycle=64, gbs=460.8, amx=False),
        _server("epyc-9755", cores=128, ghz=2.7, per_cycle=128, gbs=576, amx=False),
        _server("xeon-8480", cores=56, ghz=2.0, per_cycle=2048, gbs=307.2, gib=512, amx=True),
        _server("xeon-6980p", cores=128, ghz=2.0, per_cycle=2048, gbs=614.4, amx=True),
        _gpu(H100),
        _gpu(H800),
        _gpu(H100, name="h200", memory_bytes=141 * 10**9, memory_bandwidth=4.8e12),
    )
}
"""Two-socket servers by the name of their CPU (cores, base clock and DDR5 channels of the vendors'
data sheets; 100 Gb/s of network per server), and GPUs in nodes of eight."""

KEYS = {
    "memory": ("memory_bytes", 10**9),
    "bandwidth": ("memory_bandwidth", 1e9),
    "devices": ("devices", 1),
    "devices_per_node": ("devices_per_node", 1),
    "link": ("node_bandwidth", 1e9),
    "network": ("network_bandwidth", 1e9),
    "link_latency": ("node_latency", 1e-6),
    "network_latency": ("network_latency", 1e-6),
    "layer_latency": ("layer_seconds", 1e-6),
    "memory_share": ("memory_share", 1),
    "product_share": ("product_share", 1),
    "attention_share": ("attention_share", 1),
    "decode_attention_share": ("decode_attention_share", 1),
}
"""Keys of a machine's TOML table: field and unit (GB of 10^9 bytes, GB/s, microseconds)."""
RATES: dict[str, Precision] = {"bf16": "bf16", "fp32": "fp32", "fp8": "fp8"}
"""Keys of rates, in TFLOP/s."""
COUNTS = ("devices", "devices_per_node")
SHARES = tuple(key for key in KEYS if key.endswith("_share"))


def parse_cluster(text: str, here: ServingMachine | None = None) -> Cluster:
    """`"4xepyc-9654"`, `"8xh100"`, `"machine.toml"` -> the cluster. `here` is this machine, for the
    name "here". Raises UserError for an unknown machine.
    """
    count, name = split_count(text)
    if name == HERE and here is not None:
        return Cluster(machine=here, machines=count)
    if name.endswith(".toml"):
        return Cluster(machine=read_machine(Path(name)), machines=count)
    if name not in MACHINES:
        raise UserError(
            f"--machine '{name}' is unknown; choose one of {', '.join((*MACHINES, HERE))}, or give "
            "a .toml file"
        )
    return Cluster(machine=MACHINES[name], machines=count)


def split_count(text: str) -> tuple[int, str]:
    """`"4xh100"` -> (4, "h100"); without a number, one. Raises UserError."""
    match = re.fullmatch(r"([0-9]+)x(.+)", text)
    if match is None:
        return 1, text
    count = int(match[1].lstrip("0")[:9] or 0)
    if not 1 <= count <= MOST_MACHINES:
        raise UserError(f"--machine '{text}': give 1 to {MOST_MACHINES} machines")
    return count, match[2]


def read_machine(path: Path) -> ServingMachine:
    """The machine of a TOML file: `like`, the name of a preset, and changes to it. Raises
    UserError naming file and key.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--machine {path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--machine {path}: is not TOML ({error})") from error
    like = table.pop("like", None)
    if not isinstance(like, str) or like not in MACHINES:
        raise UserError(
            f"--machine {path}: like = {like!r}: name the preset that the table changes, one of "
            f"{', '.join(MACHINES)}"
        )
    machine, changes = MACHINES[like], dict[str, Any](name=str(table.pop("name", path.stem)))
    flops = dict(machine.flops)
    for key, value in table.items():
        number = _number(path, key, value)
        if key in RATES:
            flops[RATES[key]] = number * 1e12
            continue
        field, unit = KEYS[key]
        changes[field] = int(number * unit) if isinstance(unit, int) and unit > 1 else number * unit
        if key in COUNTS:
            changes[field] = int(number)
    machine = replace(machine, flops=flops, **changes)
    if machine.usable_bytes <= 0:
        raise UserError(
            f"--machine {path}: memory: {machine.reserve_bytes / 1e9:g} GB of it are reserved; "
            "give more"
        )
    return machine


def _number(path: Path, key: str, value: object) -> float:
    """A value of the table. Raises UserError for an unknown key or a value out of range."""
    if key not in KEYS and key not in RATES:
        known = ", ".join(("name", "like", *KEYS, *RATES))
        raise UserError(f"--machine {path}: unknown key {key}; choose from {known}")
    if not isinstance(value, int | float) or value is True or not 0 < value < 1e9:
        raise UserError(f"--machine {path}: {key}: give a number above 0, not {value!r}")
    if key in SHARES and value > 1:
        raise UserError(f"--machine {path}: {key}: give a share of at most 1, not {value!r}")
    if key in COUNTS and int(value) != value:
        raise UserError(f"--machine {path}: {key}: give a whole number, not {value!r}")
    return float(value)
