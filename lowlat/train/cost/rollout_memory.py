"""Memory of a GRPO phase: rollout weights, KV cache of rollouts, and activations of its passes."""

import math
from dataclasses import replace

import torch

from lowlat.attention.cache import PAGE_SIZE, cache_bytes_per_token
from lowlat.config.model import ModelConfig
from lowlat.engine.scheduler import MAX_SEQUENCES
from lowlat.plan.activations import FP32_BYTES, all_bytes
from lowlat.plan.job import TrainingJob
from lowlat.plan.memory import ACTIVATIONS, CASTS, CHUNK_ELEMENTS, WORKING, MemoryEstimate
from lowlat.plan.stages import ROUTED
from lowlat.train.recipe.grpo import GRPOConfig
from lowlat.train.recipe.schedule import most_rows
from lowlat.train.recipe.schema import Phase, Recipe
from lowlat.train.step.lora import updated_shapes

ROLLOUT_WEIGHTS, ROLLOUT_CACHE, REFERENCE = "rollout weights", "KV cache of rollouts", "reference"
BF16_BYTES = 2
CHUNK_BYTES = 36
"""Bytes per element of a chunk of logits: in fp32, and four tensors in fp64 for log-probabilities
and entropy (`policy.learner`).
"""
GRADIENT_BYTES = 6
"""Bytes per parameter of gradients on their way to the masters: in bf16, and converted to fp32."""


def rollout_memory(
    memory: MemoryEstimate, config: ModelConfig, recipe: Recipe, phase: Phase, job: TrainingJob
) -> MemoryEstimate:
    """Adapt `memory`, the estimate of a step on text, to the GRPO `phase`.

    The forward pass keeps the residual stream before each half of a layer; the backward pass
    recomputes one half at a time. MTP modules, if they are trained, have a pass of their own
    without activation checkpointing.
    """
    table = phase.grpo
    assert table is not None
    tokens, count = job.device_tokens, sum(memory.parameters.values())
    completions = phase.micro_batch_size * table.max_completion_length
    per_token = _kept_bytes(config)
    parts = dict(memory.parts)
    del parts[CASTS]
    rounded = count
    if recipe.lora is not None:
        rounded = sum(math.prod(shape) for shape in updated_shapes(config, recipe.lora))
    parts[ROLLOUT_WEIGHTS] = float(BF16_BYTES * rounded)
    # The call that computes all completions returns activations of its own.
    parts[ACTIVATIONS] = float(per_token * (tokens + completions))
    if phase.mtp_weight != 0:
        parts[ACTIVATIONS] += tokens * _mtp_bytes(config, job)
    cache = cache_bytes_per_token(config, torch.bfloat16)
    parts[WORKING] += GRADIENT_BYTES * _largest_half(config, memory) + cache * tokens
    parts["loss"] = _loss_bytes(config, completions, is_trained=recipe.lora is None)
    parts[ROLLOUT_CACHE] = float(cache * _cached_tokens(recipe, phase, table))
    if table.beta > 0:
        parts[REFERENCE] = float(BF16_BYTES * count)
    return replace(memory, parts=parts)


def _kept_bytes(config: ModelConfig) -> int:
    """Of `model.native.KeptActivations` per token."""
    residuals = (2 * config.num_hidden_layers + 1) * config.hidden_size * BF16_BYTES
    chosen = 0 if config.moe is None else config.moe.num_experts_per_tok
    return residuals + config.num_hidden_layers * chosen * 2 * FP32_BYTES


def _mtp_bytes(config: ModelConfig, job: TrainingJob) -> float:
    """Saved activations of all MTP modules in bytes per token: those of the layer, the inputs of
    three norms and of eh_proj, and the gradient of the loss by the output.
    """
    layers = range(config.num_hidden_layers, config.num_cache_layers)
    ends = 6 * config.hidden_size * BF16_BYTES
    kept = [sum(all_bytes(config, n, job, selective=False).values()) for n in layers]
    return ends * len(kept) + sum(kept, 0.0)


def _largest_half(config: ModelConfig, memory: MemoryEstimate) -> float:
    """Parameters of the largest attention, MLP or layer of experts."""
    layers = range(config.num_hidden_layers)
    sparse = max(1, sum(map(config.is_moe_layer, layers)))
    dense = max(1, len(layers) - sparse)
    count = memory.parameters
    experts = (count[ROUTED] + count["shared experts"]) / sparse
    return max(count["attention"] / len(layers), count["dense MLP"] / dense, experts)


def _loss_bytes(config: ModelConfig, completions: int, *, is_trained: bool) -> float:
    """A chunk of logits, and of a trained head the gradient of a chunk in bf16 and fp32."""
    logits = min(CHUNK_ELEMENTS // 2, completions * config.vocab_size)
    head = GRADIENT_BYTES * config.vocab_size * config.hidden_size
    return float(CHUNK_BYTES * logits + is_trained * head)


def _cached_tokens(recipe: Recipe, phase: Phase, table: GRPOConfig) -> int:
    """Most KV cache entries of completions that run at once in a process, with one prompt per
    group.
    """
    data, sizes = recipe.parallel.data, [table.num_generations]
    groups = most_rows(phase, data * phase.micro_batch_size) // table.num_generations
    rows = -(-groups // data) * table.num_generations
    if recipe.evaluation.prompts is not None:
        rows, sizes = MAX_SEQUENCES, [*sizes, recipe.evaluation.num_generations]
    running = min(rows, MAX_SEQUENCES)
    groups = -(-running // min(sizes))
    prompt = phase.sequence_length - table.max_completion_length
    each = table.max_completion_length + PAGE_SIZE  # a page is shared by no other completion
    return running * each + groups * prompt
