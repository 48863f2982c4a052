"""What a recipe saves by weights that stay and spends on a teacher, in FLOPs and bytes.

Owns the difference from a training of every weight alone, which is `flops`'s and `memory`'s.
"""

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
    OPTIMISER,
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
"""The part of memory that is LoRA's: weights, gradients and moments of updates."""
ATTENTION = ("attention", "scores")
"""Parts of FLOPs that are attention's."""
PASSED = {"attention": ATTENTION, "layers": LAYER_PARTS}
"""What matching layer by layer computes of the model; distributions need everything."""
HELD_IN_FP32 = ("attention", "norms", "router")
"""Parts of the parameters that move, or that compute in fp32, where attention alone is trained."""
NATIVE_PIECE_BYTES = 2**26
"""Most bytes of a piece of logits, as in `ops.divergence`."""
INPUTS_OF_MLPS = ("MLP norm", "MLP SwiGLU", "shared experts' SwiGLU")
"""Activations that only gradients of MLPs' weights read."""
INPUT_OF_ROUTER = "router input"
"""Read by the gradient of the gate's weight alone."""


def training_flops(
    config: ModelConfig, recipe: Recipe, phase: Phase, teacher: ModelConfig | None
) -> float:
    """FLOPs of training on a token in `phase`, nothing of it done again, the teacher's forward pass
    included. A weight that stays saves the product that its gradient is; MTP modules count as if
    all of theirs did, updates of LoRA as nothing.
    """
    length = phase.sequence_length
    parts = token_flops(config, length).parts
    passed = PASSED.get(phase.match, tuple(parts))
    moved = ATTENTION if recipe.trainable == "attention" else () if recipe.lora else tuple(parts)
    own = sum(
        flops * (3.0 if part in moved else 2.0) for part, flops in parts.items() if part in passed
    )
    return own + (0.0 if teacher is None else _teacher_flops(teacher, phase))


def _teacher_flops(teacher: ModelConfig, phase: Phase) -> float:
    """Of its forward pass without MTP modules; without its head where layers are matched."""
    parts = token_flops(teacher, phase.sequence_length).parts
    return sum(flops for part, flops in parts.items() if part in (*LAYER_PARTS, *_head(phase)))


def _head(phase: Phase) -> tuple[str, ...]:
    return ("head",) if phase.match == "logits" else ()


def learning_memory(
    memory: MemoryEstimate,
    config: ModelConfig,
    recipe: Recipe,
    job: TrainingJob,
    teacher: ModelConfig | None,
) -> MemoryEstimate:
    """`memory`, which is that of a training of every weight of `config` alone, as `recipe` needs
    it.
    """
    parts, activations = dict(memory.parts), memory.activations
    if recipe.lora is not None:
        # Weights stay, in the dtype of products.
        weights = parts[WEIGHTS] * (1.0 if recipe.precision == "fp32" else 0.5)
        parts |= {WEIGHTS: weights, CASTS: 0.0, "gradients": 0.0, OPTIMISER: 0.0}
        parts[UPDATES] = update_bytes(config, recipe.lora, job)
        updates_mlps = bool(set(recipe.lora.target_modules) & set(EXPERT_PROJECTIONS))
        unread = [INPUT_OF_ROUTER] if updates_mlps else [INPUT_OF_ROUTER, *INPUTS_OF_MLPS]
        activations = {k: v for k, v in activations.items() if k not in unread}
        activations |= _kept_by_updates(config, recipe.lora, job)
        parts[ACTIVATIONS] = sum(activations.values())
    elif recipe.trainable == "attention":
        moved = memory.parameters["attention"] / shares(job.layout, "attention")[1]
        parts["gradients"] = FP32_BYTES * moved
        parts[OPTIMISER] = moment_bytes(job, "attention") * moved
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
    """What the updates that `table` asks for take: fp32 weights, gradients, and moments as matrices
    of layers have them. They are in every process whole.
    """
    each = 2 * FP32_BYTES + moment_bytes(job, "attention")
    return each * count_updates(config, table)


def _kept_by_updates(config: ModelConfig, table: LoraConfig, job: TrainingJob) -> dict[str, float]:
    """What updates of projections keep for the backward pass beside the projections' own inputs:
    the rows between A and B with casts of both, and of experts their weights with the updates, in
    fp32 (`layers.lora`). With recomputation of layers that is one layer's.
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
    """The gradients' part of that."""
    return float(FP32_BYTES * count_updates(config, table))


def _held_in_bf16(memory: MemoryEstimate, job: TrainingJob) -> dict[str, float]:
    """Weights, where matrices that stay are held as products take them, and the casts of others."""
    parts = {WEIGHTS: 0.0, CASTS: live_casts(job, "attention", memory.parameters["attention"])}
    for part, count in memory.parameters.items():
        size = FP32_BYTES if part in HELD_IN_FP32 else 2
        parts[WEIGHTS] += size * held(job, part, count)
    return parts


def _more_logits(config: ModelConfig, job: TrainingJob) -> float:
    """What a piece of both models' logits takes beyond a piece of the loss without a teacher."""
    logits = float(job.device_tokens * config.vocab_size)
    taught = 2 * min(NATIVE_PIECE_BYTES, job.element_bytes * logits)
    return max(0.0, taught - PIECE_COPIES * FP32_BYTES * min(CHUNK_ELEMENTS, logits))


def _head_gradient(config: ModelConfig) -> float:
    """The part of the loss that a head which stays does not need, MTP modules' included."""
    heads = 1 + config.num_nextn_predict_layers
    return float(heads * FP32_BYTES * config.vocab_size * config.hidden_size)


def _teacher_bytes(teacher: ModelConfig, recipe: Recipe, job: TrainingJob) -> float:
    """Weights in the dtype of products, and what its largest layer makes on the way."""
    size = FP32_BYTES if recipe.precision == "fp32" else 2
    layers = range(teacher.num_hidden_layers)
    widest = max(sum(all_bytes(teacher, layer, job, selective=False).values()) for layer in layers)
    return size * count_parameters(teacher).total + widest * job.device_tokens
