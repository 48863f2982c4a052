"""Peak memory of a device by purpose: weights, casts, gradients, optimizer state, activations,
workspace.

Follows lowlat's trainer: masters, gradients and moments are fp32; in bf16 and fp8, weights are cast
when used, and the casts stay live until the backward pass.
"""

from collections import Counter
from dataclasses import dataclass

from lowlat.config.model import ModelConfig
from lowlat.plan.activations import FP32_BYTES, all_bytes, layer_bytes
from lowlat.plan.bubble import in_flight
from lowlat.plan.job import ParallelLayout, TrainingJob
from lowlat.plan.stages import ROUTED, PipelineStage, device_parameters

CHUNK_ELEMENTS = 2**23
"""Maximum logits per chunk, as in `ops.cross_entropy`."""
PIECE_COPIES = 3
"""fp32 tensors per chunk: logits, gradient, and one intermediate."""
HIGH_PRECISION = ("embedding", "head", "router", "norms", "MTP joint")
"""Parts that fp8 training computes in bf16 (DeepSeek-V3 section 3.3.1)."""
WEIGHTS = "weights"
CASTS = "cast weights"
OPTIMIZER = "optimizer"
ACTIVATIONS = "activations"
WORKING = "working memory"


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Memory of the device of a pipeline that needs the most, in bytes."""

    parts: dict[str, float]
    """Bytes by purpose."""
    activations: dict[str, float]
    """Bytes of activations by tensor."""
    parameters: dict[str, float]
    """Number of parameters by part of the model, before ZeRO sharding."""
    rank: int
    """Pipeline rank of the device."""

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def largest(self) -> str:
        """Purpose with the most bytes."""
        return max(self.parts, key=lambda part: self.parts[part])


def device_memory(
    config: ModelConfig, job: TrainingJob, devices: list[list[PipelineStage]]
) -> MemoryEstimate:
    """Memory of the device that needs the most; `devices` are the stages of each device."""
    all_ranks = (_rank(config, job, stages, rank) for rank, stages in enumerate(devices))
    return max(all_ranks, key=lambda memory: memory.total)


def _rank(
    config: ModelConfig, job: TrainingJob, stages: list[PipelineStage], rank: int
) -> MemoryEstimate:
    layout = job.layout
    parameters = device_parameters(config, stages, layout)
    activations = _activations(config, job, stages)
    parts = _states(job, parameters)
    parts[ACTIVATIONS] = sum(activations.values())
    parts[WORKING] = _workspace(config, job, stages)
    if any(stage.is_last for stage in stages):
        parts["loss"] = _loss(config, job)
    return MemoryEstimate(parts=parts, activations=activations, parameters=parameters, rank=rank)


def shares(layout: ParallelLayout, part: str) -> tuple[int, int]:
    """(number of replicas, number of replicas that shard state) of a part of the model.

    Replicas along fsdp shard their state. Routed experts have fewer replicas; DualPipe's second
    copy of a stage doubles them.
    """
    over = layout.expert if part == ROUTED else 1
    replicas = layout.replicas // over * layout.copies
    shared = max(1, layout.fsdp // over) * layout.copies
    return replicas, min(replicas, shared)


def _states(job: TrainingJob, parameters: dict[str, float]) -> dict[str, float]:
    """Bytes of masters, casts, gradients and moments."""
    zero = job.layout.zero
    states = {WEIGHTS: 0.0, CASTS: 0.0, "gradients": 0.0, OPTIMIZER: 0.0}
    for part, count in parameters.items():
        share = count / shares(job.layout, part)[1]
        states[WEIGHTS] += FP32_BYTES * held(job, part, count)
        states[CASTS] += live_casts(job, part, count)
        states["gradients"] += FP32_BYTES * (share if zero >= 2 else count)
        states[OPTIMIZER] += moment_bytes(job, part) * (share if zero >= 1 else count)
    return states


def held(job: TrainingJob, part: str, count: float) -> float:
    """Number of the `count` weights that a device stores as masters."""
    is_sharded = job.layout.zero == 3 or (job.layout.zero >= 1 and job.precision != "fp32")
    return count / shares(job.layout, part)[1] if is_sharded else count


def cast_bytes(job: TrainingJob, part: str) -> float:
    """Bytes per parameter of the cast weights, in addition to the master."""
    if job.precision == "fp32" or part == "embedding":
        return 0.0
    is_fp8 = job.precision == "fp8" and part not in HIGH_PRECISION
    return 1 + FP32_BYTES / 128**2 if is_fp8 else 2.0


def live_casts(job: TrainingJob, part: str, count: float) -> float:
    """Bytes of cast weights that are live for a whole step.

    ZeRO-1 and 2 hold all casts; ZeRO-3 gathers them layer by layer. Otherwise they stay live until
    the backward pass, except those of experts and head, which cast again (`ops.grouped`,
    `ops.cross_entropy`).
    """
    if job.layout.zero in (1, 2):
        return cast_bytes(job, part) * count
    is_fresh = part in (ROUTED, "head") or job.activation_checkpointing == "full"
    return 0.0 if job.layout.zero == 3 or is_fresh else cast_bytes(job, part) * count


def moment_bytes(job: TrainingJob, part: str) -> float:
    """Bytes of optimizer moments per parameter."""
    size = FP32_BYTES if job.moments == "fp32" else 2
    is_adam = job.optimizer == "adamw" or part in HIGH_PRECISION
    return float(size * (2 if is_adam else 1))


def _activations(
    config: ModelConfig, job: TrainingJob, stages: list[PipelineStage]
) -> dict[str, float]:
    """Activation bytes of all layers of a device and all micro-batches in flight, by tensor."""
    kept: dict[str, float] = {}
    for stage in stages:
        tokens = job.device_tokens * in_flight(job.layout, job.micro_batches, stage.index)
        # Layers of the same form need the same memory.
        example = {_form(config, layer): layer for layer in stage.all_layers(config)}
        forms = Counter(_form(config, layer) for layer in stage.all_layers(config))
        for form, count in forms.items():
            for name, size in layer_bytes(config, example[form], job).items():
                kept[name] = kept.get(name, 0.0) + size * tokens * count
    return kept


def _form(config: ModelConfig, layer: int) -> tuple[bool, object]:
    return config.is_moe_layer(layer), config.attention_of(layer)


def _workspace(config: ModelConfig, job: TrainingJob, stages: list[PipelineStage]) -> float:
    """Workspace of one layer's backward pass: recomputed tensors and their gradients; with ZeRO-3
    also the gathered weights of two layers.
    """
    layers = [layer for stage in stages for layer in stage.all_layers(config)]
    whole = max(
        (sum(all_bytes(config, layer, job, selective=False).values()) for layer in layers),
        default=0.0,
    )
    recomputes = job.activation_checkpointing == "full"
    space = whole * job.device_tokens * (2 if recomputes else 1)
    if job.layout.zero == 3:
        parameters = device_parameters(config, stages, job.layout)
        space += (
            2 * sum(cast_bytes(job, p) * n for p, n in parameters.items()) / max(1, len(layers))
        )
    return space


def _loss(config: ModelConfig, job: TrainingJob) -> float:
    """Bytes of the loss: per head, its gradient and hidden state; and a chunk of logits."""
    heads = 1 + config.num_nextn_predict_layers
    parts = job.layout.table_parts
    gradient = FP32_BYTES * config.vocab_size * config.hidden_size / parts
    hidden = job.device_tokens * config.hidden_size * job.element_bytes
    logits = min(CHUNK_ELEMENTS, job.device_tokens * config.vocab_size / parts)
    return heads * (gradient + hidden) + PIECE_COPIES * FP32_BYTES * logits
