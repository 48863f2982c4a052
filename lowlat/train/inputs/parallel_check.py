"""Validation of the [parallel] table against the model and the phases of a recipe, before data is
read.
"""

from lowlat.config.model import ModelConfig
from lowlat.train.parallel.mesh import expert_sizes
from lowlat.train.parallel.tensor import check_divisible
from lowlat.train.pipeline.check import check_pipeline
from lowlat.train.recipe.schema import Recipe
from lowlat.utils.errors import UserError


def check_parallel(config: ModelConfig, recipe: Recipe, origin: str) -> None:
    """Raises UserError naming the key whose size does not fit."""
    sizes = recipe.parallel
    if sizes.tensor > 1 and recipe.precision == "fp8":
        raise UserError(
            f"{origin}: precision fp8 does not support parallel.tensor {sizes.tensor}; leave it "
            "at 1, or train in bf16"
        )
    if sizes.tensor > 1:
        check_divisible(config, sizes.tensor, origin)
    if sizes.expert > 1:
        experts = 0 if config.moe is None else config.moe.n_routed_experts
        if not experts or experts % sizes.expert:
            raise UserError(
                f"{origin}: parallel.expert {sizes.expert} does not divide n_routed_experts "
                f"{experts}"
            )
        try:
            expert_sizes(sizes, sizes.data * sizes.context)
        except UserError as error:
            raise UserError(f"{origin}: {error}") from error
    if sizes.pipeline > 1:
        check_pipeline(config, recipe, origin)
    if sizes.context > 1:
        chunks = 2 * sizes.context
        for phase in recipe.phase:
            if phase.sequence_length % chunks:
                raise UserError(
                    f"{origin}: phase {phase.name}: sequence_length {phase.sequence_length} is not "
                    f"a multiple of {chunks}, twice parallel.context"
                )
