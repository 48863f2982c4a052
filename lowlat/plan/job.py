"""How a model is to be trained, as far as cost depends on it: Job, its Layout over devices, and
which combinations are possible.

Owns no model and no machine: those are `config.model` and `machine`.
"""

from dataclasses import dataclass, field
from typing import Literal

from lowlat.config.attention import GQAConfig, GTAConfig
from lowlat.config.model import ModelConfig
from lowlat.utils.errors import UserError

Precision = Literal["fp32", "bf16", "fp8"]
Optimiser = Literal["adamw", "muon"]
Recompute = Literal["none", "selective", "layers"]
Schedule = Literal["1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev"]
Kernels = Literal["torch", "fused"]
ZeroStage = Literal[0, 1, 2, 3]

BIDIRECTIONAL = ("dualpipe", "dualpipev")
"""Schedules that overlap the traffic of experts with computation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How the work is divided over dp * fsdp * cp * tp * pp devices."""

    dp: int = 1
    """Replicas whose optimiser states are replicas too."""
    fsdp: int = 1
    """Replicas that share what `zero` says."""
    zero: ZeroStage = 1
    """What each of fsdp replicas holds a share of: 1 optimiser states, 2 gradients too, 3 weights
    too (FSDP2 with resharding); 0 nothing (ZeRO, arXiv 1910.02054)."""
    tp: int = 1
    """Devices that divide every projection; activations between them are divided by token, evenly
    or not."""
    divides_tables: bool = True
    """Whether tp divides embedding, head and loss too; lowlat's trainer keeps them whole."""
    cp: int = 1
    """Devices that divide a sequence."""
    ep: int = 1
    """Devices that divide the routed experts, taken from the dp * fsdp * cp ones."""
    pp: int = 1
    """Devices that divide the layers."""
    schedule: Schedule = "1f1b"
    """Order of micro-batches in the pipeline."""
    stages_per_device: int = 2
    """Stages of a device with the interleaved schedule."""

    @property
    def table_parts(self) -> int:
        """Parts of embedding and head, of which a device has one."""
        return self.tp if self.divides_tables else 1

    @property
    def replicas(self) -> int:
        """Devices that read different tokens."""
        return self.dp * self.fsdp * self.cp

    @property
    def devices(self) -> int:
        return self.replicas * self.tp * self.pp

    @property
    def copies(self) -> int:
        """Devices of a pipeline that hold the same stage: two with DualPipe."""
        return 2 if self.schedule == "dualpipe" and self.pp > 1 else 1

    @property
    def num_stages(self) -> int:
        """Stages the layers are cut into."""
        if self.pp == 1:
            return 1
        per_device = {"interleaved": self.stages_per_device, "dualpipev": 2}
        return self.pp * per_device.get(self.schedule, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One optimiser step of a training."""

    sequence_length: int
    """Tokens of a row T."""
    batch_rows: int
    """Rows of a step, over all devices."""
    micro_batch_rows: int = 1
    """Rows a device computes at once."""
    precision: Precision = "bf16"
    """Of products and activations; masters and gradients are fp32 in every case."""
    optimiser: Optimiser = "adamw"
    """adamw keeps two moments per parameter, muon one for matrices of layers."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Number type of the moments (bf16 in DeepSeek-V3 section 3.3.3)."""
    recompute: Recompute = "none"
    """What backward passes compute again: selective is norms, MLA's up-projections and SwiGLU
    (DeepSeek-V3 section 3.2.3), layers is everything but the layers' inputs."""
    kernels: Kernels = "torch"
    """torch: attention padded to one width, as `attention.flash` has it; fused: no padding."""
    load_margin: float = 0.0
    """Room for experts that get more rows than the mean, as a share of the mean."""
    layout: Layout = field(default_factory=Layout)
    """The division over devices."""

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.sequence_length * self.batch_rows

    @property
    def micro_batches(self) -> int:
        """Micro-batches a device computes per step."""
        return self.batch_rows // (self.layout.dp * self.layout.fsdp * self.micro_batch_rows)

    @property
    def device_tokens(self) -> float:
        """Tokens of a micro-batch that a device holds activations of."""
        parts = self.layout.cp * self.layout.tp
        return self.sequence_length * self.micro_batch_rows / parts

    @property
    def element_bytes(self) -> int:
        """Bytes of an activation that is kept in full precision."""
        return 4 if self.precision == "fp32" else 2


def check(config: ModelConfig, job: Job) -> None:
    """Raise UserError where `config` cannot be divided as `job` says."""
    layout, moe = job.layout, config.moe
    heads = config.num_attention_heads
    if isinstance(config.attention, GQAConfig | GTAConfig):
        heads = config.attention.num_key_value_heads
    experts = 1 if moe is None else moe.n_routed_experts
    per_pass = layout.dp * layout.fsdp * job.micro_batch_rows
    pieces = config.num_hidden_layers + 1
    faults = (
        (heads % layout.tp, f"tp {layout.tp}: must divide the {heads} attention heads"),
        (experts % layout.ep, f"ep {layout.ep}: must divide the {experts} routed experts"),
        (
            layout.replicas % layout.ep,
            f"ep {layout.ep}: must divide dp * fsdp * cp = {layout.replicas}",
        ),
        (
            job.batch_rows % per_pass,
            f"batch of {job.batch_rows} rows: must be a multiple of dp * fsdp * rows of a "
            f"micro-batch = {per_pass}",
        ),
        (
            job.sequence_length % layout.cp,
            f"sequence length {job.sequence_length}: must be a multiple of cp = {layout.cp}",
        ),
        (
            layout.num_stages > pieces,
            f"pp {layout.pp}: {layout.num_stages} stages for {config.num_hidden_layers} layers",
        ),
        (
            job.micro_batches < fewest_micro_batches(layout),
            f"pp {layout.pp}: {layout.schedule} needs {fewest_micro_batches(layout)} micro-batches "
            f"per step and gets {job.micro_batches}; raise the batch or lower pp",
        ),
        (
            layout.pp > 1 and layout.schedule == "dualpipe" and layout.pp % 2,
            f"pp {layout.pp}: dualpipe needs an even number",
        ),
    )
    for fault, message in faults:
        if fault:
            raise UserError(message)


def fewest_micro_batches(layout: Layout) -> int:
    """Micro-batches below which the schedule cannot be run."""
    if layout.pp == 1:
        return 1
    return layout.pp * (2 if layout.schedule in BIDIRECTIONAL else 1)
