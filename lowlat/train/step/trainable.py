"""Which weights of a model move: all of them, or those of attention alone.

Owns the choice and what does not go with weights that stay; the updates of LoRA are `lora`'s.
"""

import torch

from lowlat.config.model import ModelConfig
from lowlat.model.block import DecoderLayer
from lowlat.model.linear import Embedding, Linear
from lowlat.model.transformer import Transformer
from lowlat.train.layers.stacked_experts import StackedExperts
from lowlat.train.recipe.schedule import value_at
from lowlat.train.recipe.schema import Recipe
from lowlat.utils.errors import UserError


def keep_all_but_attention(model: Transformer) -> None:
    """Leave gradients to the matrices and biases of attention, MTP modules' included."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, DecoderLayer):
            for part in module.self_attn.modules():
                if isinstance(part, Linear):
                    part.requires_grad_(True)


def hold_frozen(model: Transformer, dtype: torch.dtype) -> None:
    """Hold the matrices that stay and that products take in `dtype`, as products have them: no step
    casts them again. Norms and the gates of experts, which compute in fp32, keep their dtype.
    """
    for module in model.modules():
        if isinstance(module, Linear | Embedding | StackedExperts):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)


def check_trainable(config: ModelConfig, recipe: Recipe, origin: str) -> None:
    """Raises UserError where `recipe` asks for what does not go with MLPs that stay."""
    if recipe.trainable == "all":
        return
    what = "trainable = 'attention'"
    if recipe.precision == "fp8":
        raise UserError(f"{origin}: {what} trains in bf16 or fp32; set precision = 'bf16'")
    check_divides_batches(recipe, what, origin)
    check_biases_stay(config, recipe, what, origin)


def check_divides_batches(recipe: Recipe, what: str, origin: str) -> None:
    """Raises UserError where [parallel] divides more than batches and weights, which `what` does
    not go with.
    """
    for axis in ("expert", "tensor", "pipeline", "context"):
        size = getattr(recipe.parallel, axis)
        if size > 1:
            raise UserError(
                f"{origin}: parallel.{axis} {size} does not go with {what}; leave it at 1, and "
                "divide the run by data or fsdp"
            )


def check_biases_stay(config: ModelConfig, recipe: Recipe, what: str, origin: str) -> None:
    """Raises UserError where a phase of `recipe` moves routing biases, which `what` leaves."""
    if config.moe is None or config.moe.topk_method != "noaux_tc":
        return
    for phase in recipe.phase:
        if any(value_at(phase.bias_update_speed, step, phase.steps) for step in range(phase.steps)):
            raise UserError(
                f"{origin}: phase {phase.name}: {what} leaves routing biases as they are; set "
                "bias_update_speed = 0"
            )
