"""FLOPs and memory of LoRA, attention-only training and distillation, relative to full training."""

from dataclasses import replace

from lowlat.config.model import ModelConfig
from lowlat.config.parameter_count import count_parameters
from lowlat.plan.activations import FP32_BYTES, all_bytes
from lowlat.plan.flops import LAYER_PARTS, token_flops
from lowlat.plan.job import TrainingJob
from lowlat.plan.memory import (
    ACTIVATIONS,
    CASTS,
    CHUNK_ELEMENTS,
    OPTIMIZER,
    PIECE_COPIES,
    WEIGHTS,
    MemoryEstimate,
    held,
    live_casts,
    moment_bytes,
    shares,
)
from lowlat.train.recipe.schema import LoraConfig, Phase, Recipe
from lowlat.train.step.lora import (
    EXPERT_PROJECTIONS,
    count_added_up,
    count_updates,
    updated_shapes,
)

UPDATES = "updates"
"""Memory part of LoRA: weights, gradients and moments of updates."""
ATTENTION = ("attention", "scores")
"""FLOPs parts of attention."""
PASSED = {"attention": ATTENTION, "layers": LAYER_PARTS}
"""FLOPs parts computed in layer-wise distillation, by `phase.match`; logits need all parts."""
HELD_IN_FP32 = ("attention", "norms", "router")
"""Parameters stored in fp32 if only attention is trained."""
NATIVE_PIECE_BYTES = 2**26
"""Maximum bytes of a chunk of logits, as in `ops.divergence`."""
INPUTS_OF_MLPS = ("MLP norm", "MLP SwiGLU", "shared experts' SwiGLU")
"""Activations that only the weight gradients of MLPs need."""
INPUT_OF_ROUTER = "router input"
"""Activation that only the weight gradient of the gate needs."""


def training_flops(
    config: ModelConfig, recipe: Recipe, phase: Phase, teacher: ModelConfig | None
) -> float:
    """FLOPs per token of training in `phase`, with the teacher's forward pass, the sampling of GRPO
    and without recomputation.

    Frozen weights have no weight gradient: 2x instead of 3x the forward FLOPs. MTP modules count as
    frozen; LoRA updates count as zero.
    """
    length = phase.sequence_length
    parts = token_flops(config, length).parts
    passed = PASSED.get(phase.match, tuple(parts))
    moved = ATTENTION if recipe.trainable == "attention" else () if recipe.lora else tuple(parts)
    own = sum(
        flops * (3.0 if part in moved else 2.0) for part, flops in parts.items() if part in passed
    )
    own += 0.0 if phase.grpo is None else sum(parts.values())
    return own + (0.0 if teacher is None else _teacher_flops(teacher, phase))


def _teacher_flops(teacher: ModelConfig, phase: Phase) -> float:
    """Forward FLOPs of the teacher without MTP modules; in layer-wise distillation also without its
    head.
    """
    parts = token_flops(teacher, phase.sequence_length).parts
    passed = (*LAYER_PARTS, "head") if phase.match == "logits" else LAYER_PARTS
    return sum(flops for part, flops in parts.items() if part in passed)


def learning_memory(
    memory: MemoryEstimate,
    config: ModelConfig,
    recipe: Recipe,
    job: TrainingJob,
    teacher: ModelConfig | None,
) -> MemoryEstimate:
    """Adapt `memory`, the estimate of full training of `config`, to LoRA, attention-only training
    and distillation in `recipe`.
    """
    parts, activations = dict(memory.parts), memory.activations
    if recipe.lora is not None:
        # Weights are frozen, in the dtype of matrix products.
        weights = parts[WEIGHTS] * (1.0 if recipe.precision == "fp32" else 0.5)
        parts |= {WEIGHTS: weights, CASTS: 0.0, "gradients": 0.0, OPTIMIZER: 0.0}
        parts[UPDATES] = update_bytes(config, recipe.lora, job)
        updates_mlps = bool(set(recipe.lora.target_modules) & set(EXPERT_PROJECTIONS))
        unread = [INPUT_OF_ROUTER] if updates_mlps else [INPUT_OF_ROUTER, *INPUTS_OF_MLPS]
        added = _kept_by_updates(config, recipe.lora, job)
        activations = {k: v for k, v in activations.items() if k not in unread} | added
        parts[ACTIVATIONS] = sum(activations.values())
    elif recipe.trainable == "attention":
        moved = memory.parameters["attention"] / shares(job.layout, "attention")[1]
        parts["gradients"] = FP32_BYTES * moved
        parts[OPTIMIZER] = moment_bytes(job, "attention") * moved
        parts["loss"] -= _head_gradient(config)
        if recipe.precision == "bf16":
            parts |= _held_in_bf16(memory, job)
        unread = [INPUT_OF_ROUTER, *INPUTS_OF_MLPS]
        activations = {k: v for k, v in activations.items() if k not in unread}
        parts[ACTIVATIONS] = sum(activations.values())
    if teacher is not None:
        parts["teacher"] = _teacher_bytes(teacher, recipe, job)
        parts["loss"] += _more_logits(config, job)
    return replace(memory, parts=parts, activations=activations)


def update_bytes(config: ModelConfig, table: LoraConfig, job: TrainingJob) -> float:
    """Bytes of LoRA updates: fp32 weights, gradients and moments, not sharded."""
    each = 2 * FP32_BYTES + moment_bytes(job, "attention")
    return each * count_updates(config, table)


def _kept_by_updates(config: ModelConfig, table: LoraConfig, job: TrainingJob) -> dict[str, float]:
    """Activations that LoRA updates save for the backward pass, besides the projections' inputs.

    These are the rank-r activations between A and B, casts of A and B, and for experts the fp32 sum
    of weights and updates (`layers.lora`). With activation checkpointing only one layer's are live.
    """
    single = [shape for shape in updated_shapes(config, table) if len(shape) == 2]
    inner = table.rank * len(single) * job.device_tokens
    factors = sum(table.rank * sum(shape) for shape in single)
    found = {
        "rows of updates": float(job.element_bytes * (inner + factors)),
        "updated experts": float(FP32_BYTES * count_added_up(config, table)),
    }
    share = 1 / config.num_hidden_layers if job.activation_checkpointing == "full" else 1.0
    return {name: size * share for name, size in found.items()}


def gradient_bytes(config: ModelConfig, table: LoraConfig) -> float:
    """Bytes of the gradients of LoRA updates."""
    return float(FP32_BYTES * count_updates(config, table))


def _held_in_bf16(memory: MemoryEstimate, job: TrainingJob) -> dict[str, float]:
    """Bytes of weights and casts if frozen matrices are stored in bf16."""
    parts = {WEIGHTS: 0.0, CASTS: live_casts(job, "attention", memory.parameters["attention"])}
    for part, count in memory.parameters.items():
        size = FP32_BYTES if part in HELD_IN_FP32 else 2
        parts[WEIGHTS] += size * held(job, part, count)
    return parts


def _more_logits(config: ModelConfig, job: TrainingJob) -> float:
    """Additional bytes for chunks of logits of student and teacher."""
    logits = float(job.device_tokens * config.vocab_size)
    taught = 2 * min(NATIVE_PIECE_BYTES, job.element_bytes * logits)
    return max(0.0, taught - PIECE_COPIES * FP32_BYTES * min(CHUNK_ELEMENTS, logits))


def _head_gradient(config: ModelConfig) -> float:
    """Bytes of the head's gradient, MTP modules included, which a frozen head does not need."""
    heads = 1 + config.num_nextn_predict_layers
    return float(heads * FP32_BYTES * config.vocab_size * config.hidden_size)


def _teacher_bytes(teacher: ModelConfig, recipe: Recipe, job: TrainingJob) -> float:
    """Bytes of the teacher: weights in the dtype of matrix products, activations of one layer."""
    size = FP32_BYTES if recipe.precision == "fp32" else 2
    layers = range(teacher.num_hidden_layers)
    widest = max(sum(all_bytes(teacher, layer, job, selective=False).values()) for layer in layers)
    return size * count_parameters(teacher).total + widest * job.device_tokens
