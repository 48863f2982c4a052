"""Trainable weights: all, or those of attention only; and the options that frozen weights exclude.
LoRA is in `lora`.
"""

import torch

from lowlat.config.model import ModelConfig
from lowlat.model.block import DecoderLayer
from lowlat.model.indexer import Indexer
from lowlat.model.linear import Embedding, Linear
from lowlat.model.transformer import Transformer
from lowlat.train.layers.stacked_experts import StackedExperts
from lowlat.train.recipe.schedule import value_at
from lowlat.train.recipe.schema import Recipe
from lowlat.utils.errors import UserError


def freeze_all_but_attention(model: Transformer) -> None:
    """Freeze all parameters but matrices, biases and indexers of attention, also of MTP modules."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, DecoderLayer):
            for part in module.self_attn.modules():
                if isinstance(part, Linear | Indexer):
                    part.requires_grad_(True)


def cast_frozen(model: Transformer, dtype: torch.dtype) -> None:
    """Store frozen matrices in `dtype`, that of the products, so that no step casts them. Norms and
    gates, which compute in fp32, keep their dtype.
    """
    for module in model.modules():
        if isinstance(module, Linear | Embedding | StackedExperts):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)


def check_trainable(config: ModelConfig, recipe: Recipe, origin: str) -> None:
    """Raises UserError if `recipe` combines trainable = 'attention' with an option that excludes
    it.
    """
    if recipe.trainable == "all":
        return
    what = "trainable = 'attention'"
    if recipe.precision == "fp8":
        raise UserError(f"{origin}: {what} trains in bf16 or fp32; set precision = 'bf16'")
    check_divides_batches(recipe, what, origin)
    check_biases_stay(config, recipe, what, origin)


def check_stages(config: ModelConfig, recipe: Recipe, origin: str) -> None:
    """Raises UserError if `recipe` sets a stage of sparse attention that the model has not, or that
    trains no weight.
    """
    for phase in recipe.phase:
        where = f"{origin}: phase {phase.name}: dsa_stage = '{phase.dsa_stage}'"
        if phase.dsa_stage is not None and not config.is_sparse:
            raise UserError(
                f"{where} needs a model with indexers, such as deepseek_v32; leave it out, or "
                "convert the model with lowlat convert --to dsa"
            )
        if recipe.lora is not None and "dsa_indexer_loss_coeff" in phase.model_fields_set:
            raise UserError(
                f"{origin}: phase {phase.name}: dsa_indexer_loss_coeff has no effect with lora, "
                "which freezes the indexers; leave it out"
            )
        if not phase.is_warmup:
            continue
        if recipe.lora is not None:
            raise UserError(f"{where} trains the indexers only; remove lora")
        if recipe.distillation is not None:
            raise UserError(f"{where} learns from the model's own attention; remove distillation")
        if phase.dsa_indexer_loss_coeff == 0:
            raise UserError(f"{where} has no loss; set dsa_indexer_loss_coeff above 0")


def check_divides_batches(recipe: Recipe, what: str, origin: str) -> None:
    """Raises UserError if [parallel] divides more than batches and weights: `what` excludes it."""
    for axis in ("expert", "tensor", "pipeline", "context"):
        size = getattr(recipe.parallel, axis)
        if size > 1:
            raise UserError(
                f"{origin}: {what} does not support parallel.{axis} {size}; leave it at 1, and "
                "use data or fsdp"
            )


def check_biases_stay(config: ModelConfig, recipe: Recipe, what: str, origin: str) -> None:
    """Raises UserError if a phase of `recipe` updates routing biases, which `what` excludes."""
    if config.moe is None or not config.moe.has_router_bias:
        return
    for phase in recipe.phase:
        if any(value_at(phase.bias_update_speed, step, phase.steps) for step in range(phase.steps)):
            raise UserError(
                f"{origin}: phase {phase.name}: {what} does not update routing biases; set "
                "bias_update_speed = 0"
            )
