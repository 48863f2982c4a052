"""Machines of the cost model: published rates and bandwidths of H800 and H100, and the shares of
them that kernels reach. `rate` measures this machine.
"""

from dataclasses import dataclass, replace

from lowlat.plan.job import Precision


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """A device and its links."""

    name: str
    """Name on the command line."""
    memory_bytes: int
    """Memory per device."""
    reserve_bytes: int
    """Memory per device reserved for context and communication buffers."""
    devices_per_node: int
    """Devices connected by NVLink."""
    flops: dict[Precision, float]
    """Published FLOP/s of dense products by precision."""
    memory_bandwidth: float
    """Published bytes/s of a device's memory."""
    node_bandwidth: float
    """Bytes/s a device sends within its node."""
    network_bandwidth: float
    """Bytes/s a device sends to other nodes."""
    product_share: float = 0.6
    """Share of `flops` that projections reach. DeepGEMM publishes 1,100 to 1,300 of 1,979 TFLOP/s
    for the grouped fp8 products of DeepSeek-V3 on the H800; smaller and weight-gradient products
    reach less."""
    attention_share: float = 0.4
    """Share of the bf16 rate that causal attention reaches, forward and backward together
    (FlashAttention-2 on the H100: 335 to 400 of 989 TFLOP/s)."""
    memory_share: float = 0.8
    """Share of memory_bandwidth that elementwise kernels reach."""
    link_share: float = 0.9
    """Share of the link bandwidths that collectives reach (DeepEP: 43 to 47 of 50 GB/s)."""
    overlap_share: float = 20 / 132
    """Share of a device that moves data while it computes (DeepSeek-V3 section 3.2.2: 20 of 132
    SMs)."""

    @property
    def usable_bytes(self) -> int:
        """Memory that training can use."""
        return self.memory_bytes - self.reserve_bytes


H800 = Machine(
    name="h800",
    memory_bytes=80 * 2**30,
    reserve_bytes=4 * 10**9,
    devices_per_node=8,
    flops={"fp32": 494.7e12, "bf16": 989.4e12, "fp8": 1978.9e12},
    memory_bandwidth=3.35e12,
    node_bandwidth=160e9,
    network_bandwidth=50e9,
)
"""Links as in DeepSeek-V3 section 3.2.2; rates from Nvidia's data sheet, fp32 as TF32; the memory
is five stacks of 16 GiB."""

H100 = replace(H800, name="h100", node_bandwidth=450e9)
"""The same device with its full NVLink."""

MACHINES = {machine.name: machine for machine in (H800, H100)}
