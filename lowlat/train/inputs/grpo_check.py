"""Checks of GRPO phases that need a model config and a recipe only, before any data is read."""

from lowlat.config.attention import distinct
from lowlat.config.model import ModelConfig, TPAConfig
from lowlat.train.recipe.schema import Recipe
from lowlat.utils.errors import UserError


def check_grpo(config: ModelConfig, recipe: Recipe, origin: str) -> None:
    """Raises UserError naming the key that a GRPO phase of `recipe` does not support."""
    for phase in recipe.phase:
        if phase.grpo is None:
            continue
        where = f"{origin}: phase {phase.name}: grpo"
        if config.is_sparse or any(isinstance(a, TPAConfig) for a in distinct(config.attention)):
            raise UserError(f"{where} does not support sparse attention (DSA) and TPA")
        if recipe.precision != "bf16" or recipe.device != "cpu":
            raise UserError(
                f"{where} samples in bf16 on the CPU; set precision 'bf16', device 'cpu'"
            )
        if recipe.parallel.processes > recipe.parallel.data or recipe.parallel.expert > 1:
            raise UserError(
                f"{where} divides batches alone; of [parallel], leave all sizes but data at 1"
            )
        if recipe.distillation is not None:
            raise UserError(f"{where} learns from rewards; remove distillation")
        if phase.grpo.beta > 0 and recipe.base_model is None:
            raise UserError(f"{where}: beta needs base_model, the reference; set it, or beta = 0")
