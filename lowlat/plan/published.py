"""Published training runs (DeepSeek-V3) as training jobs, to compare estimates with."""

from dataclasses import dataclass

from lowlat.plan.job import ParallelLayout, TrainingJob
from lowlat.plan.machine import H800, Machine


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedTraining:
    """A training run and its published cost."""

    job: TrainingJob
    machine: Machine
    hours_per_trillion: float
    """Device-hours per trillion tokens."""


DEEPSEEK_V3 = PublishedTraining(
    job=TrainingJob(
        sequence_length=4096,
        batch_size=15360,
        precision="fp8",
        moments="bf16",
        activation_checkpointing="selective",
        kernels="fused",
        load_margin=0.2,
        layout=ParallelLayout(fsdp=128, zero=1, expert=64, pipeline=16, schedule="dualpipe"),
    ),
    machine=H800,
    hours_per_trillion=180e3,
)
"""DeepSeek-V3 technical report, sections 1, 3.2, 3.3 and 4.2; micro-batches of one row and the
capacity margin of experts are assumptions."""

PUBLISHED = {"deepseek-v3": DEEPSEEK_V3}
