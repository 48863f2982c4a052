"""Training job as the cost model sees it: `TrainingJob`, its `ParallelLayout` over devices, and the
check that a model can be divided that way.
"""

from dataclasses import dataclass, field
from typing import Literal

from lowlat.config.attention import GQAConfig, GTAConfig
from lowlat.config.model import ModelConfig
from lowlat.utils.errors import UserError

Precision = Literal["fp32", "bf16", "fp8"]
Optimizer = Literal["adamw", "muon"]
ActivationCheckpointing = Literal["none", "selective", "full"]
Schedule = Literal["1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev"]
Kernels = Literal["torch", "fused"]
ZeroStage = Literal[0, 1, 2, 3]

BIDIRECTIONAL = ("dualpipe", "dualpipev")
"""Schedules that overlap the expert all-to-all with computation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelLayout:
    """Parallelism over data * fsdp * context * tensor * pipeline devices."""

    data: int = 1
    """Replicas with replicated optimizer state."""
    fsdp: int = 1
    """Replicas that shard state as `zero` specifies."""
    zero: ZeroStage = 1
    """ZeRO stage (arXiv 1910.02054), sharded over fsdp: 0 nothing, 1 optimizer state, 2 also
    gradients, 3 also weights (FSDP2 with resharding)."""
    tensor: int = 1
    """Devices that divide every projection; activations between projections are divided by
    token."""
    divides_tables: bool = True
    """Whether tensor also divides embedding, head and loss; lowlat's trainer replicates them."""
    context: int = 1
    """Devices that divide a sequence."""
    expert: int = 1
    """Devices that divide the routed experts, taken from the data * fsdp * context ones."""
    pipeline: int = 1
    """Devices that divide the layers."""
    schedule: Schedule = "1f1b"
    """Order of micro-batches in the pipeline."""
    stages_per_device: int = 2
    """Stages of a device with the interleaved schedule."""

    @property
    def table_parts(self) -> int:
        """Number of parts that embedding and head are divided into."""
        return self.tensor if self.divides_tables else 1

    @property
    def replicas(self) -> int:
        """Devices with different tokens."""
        return self.data * self.fsdp * self.context

    @property
    def devices(self) -> int:
        return self.replicas * self.tensor * self.pipeline

    @property
    def copies(self) -> int:
        """Devices of a pipeline that hold the same stage: two with DualPipe."""
        return 2 if self.schedule == "dualpipe" and self.pipeline > 1 else 1

    @property
    def num_stages(self) -> int:
        if self.pipeline == 1:
            return 1
        per_device = {"interleaved": self.stages_per_device, "dualpipev": 2}
        return self.pipeline * per_device.get(self.schedule, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingJob:
    """One optimizer step of a training run."""

    sequence_length: int
    """Tokens per row (T)."""
    batch_size: int
    """Rows per global batch."""
    micro_batch_size: int = 1
    """Rows per forward and backward pass of a device."""
    precision: Precision = "bf16"
    """Precision of products and activations; masters and gradients are always fp32."""
    optimizer: Optimizer = "adamw"
    """adamw has two moments per parameter, muon one for matrices of layers."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Data type of the moments (bf16 in DeepSeek-V3 section 3.3.3)."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """Recomputation in the backward pass: selective is norms, MLA's up-projections and SwiGLU
    (DeepSeek-V3 section 3.2.3), full is everything from the layers' inputs."""
    kernels: Kernels = "torch"
    """torch: attention pads values, as `attention.flash`; fused: no padding."""
    load_margin: float = 0.0
    """Capacity margin for experts with more tokens than the mean, as a share of the mean."""
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    """Parallelism."""

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.sequence_length * self.batch_size

    @property
    def micro_batches(self) -> int:
        """Micro-batches per device and step."""
        return self.batch_size // (self.layout.data * self.layout.fsdp * self.micro_batch_size)

    @property
    def device_tokens(self) -> float:
        """Tokens per micro-batch whose activations a device holds."""
        parts = self.layout.context * self.layout.tensor
        return self.sequence_length * self.micro_batch_size / parts

    @property
    def element_bytes(self) -> int:
        """Bytes of an activation that is not fp8."""
        return 4 if self.precision == "fp32" else 2


def check(config: ModelConfig, job: TrainingJob) -> None:
    """Raise UserError naming the axis if the layout of `job` does not divide `config`."""
    layout, moe = job.layout, config.moe
    heads = config.num_attention_heads
    if isinstance(config.attention, GQAConfig | GTAConfig):
        heads = config.attention.num_key_value_heads
    experts = 1 if moe is None else moe.n_routed_experts
    units, stages = len(config.layer_units()), layout.num_stages
    kind = "layers" if units == config.num_hidden_layers else "groups of layers that share a choice"
    per_pass = layout.data * layout.fsdp * job.micro_batch_size
    pipeline, context, fewest = layout.pipeline, layout.context, fewest_micro_batches(layout)
    problems = (
        (heads % layout.tensor, f"tensor {layout.tensor}: must divide the {heads} attention heads"),
        (
            experts % layout.expert,
            f"expert {layout.expert}: must divide the {experts} routed experts",
        ),
        (
            layout.replicas % layout.expert,
            f"expert {layout.expert}: must divide data * fsdp * context = {layout.replicas}",
        ),
        (
            job.batch_size % per_pass,
            f"batch size {job.batch_size}: must be a multiple of data * fsdp * micro-batch size = "
            f"{per_pass}",
        ),
        (
            job.sequence_length % context,
            f"sequence length {job.sequence_length}: must be a multiple of context = {context}",
        ),
        (stages > units + 1, f"pipeline {pipeline}: {stages} stages for {units} {kind}"),
        (
            job.micro_batches < fewest,
            f"pipeline {pipeline}: {layout.schedule} needs {fewest} micro-batches per step and "
            f"gets {job.micro_batches}; raise the batch size or lower pipeline",
        ),
        (
            pipeline > 1 and layout.schedule == "dualpipe" and pipeline % 2,
            f"pipeline {pipeline}: dualpipe needs an even number",
        ),
    )
    for is_wrong, message in problems:
        if is_wrong:
            raise UserError(message)


def fewest_micro_batches(layout: ParallelLayout) -> int:
    """Minimum number of micro-batches of the schedule."""
    if layout.pipeline == 1:
        return 1
    return layout.pipeline * (2 if layout.schedule in BIDIRECTIONAL else 1)
