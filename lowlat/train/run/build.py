"""A recipe's model: weights, their place among processes, optimiser.

Owns how they are made anew, from a checkpoint or from a state; what a recipe reads is `inputs`'s.
"""

from collections.abc import Mapping, MutableMapping
from pathlib import Path

import torch
from torch import Tensor

from lowlat.checkpoint.load import load_model
from lowlat.config.model import ModelConfig
from lowlat.model.init import init_weights
from lowlat.model.transformer import Transformer
from lowlat.train.layers.fp8 import use_fp8
from lowlat.train.layers.fused import checkpoint_activations, use_fused_layers
from lowlat.train.layers.stacked_experts import stack_experts
from lowlat.train.parallel.mesh import ProcessMesh
from lowlat.train.parallel.parallelize import ShardedParameters, parallelize
from lowlat.train.recipe.schema import Recipe
from lowlat.train.step.lora import add_lora, base_dtype
from lowlat.train.step.optim import Optimizer
from lowlat.train.step.passes import Passes, PlainPasses
from lowlat.train.step.teacher import Teacher
from lowlat.train.step.trainable import cast_frozen, freeze_all_but_attention
from lowlat.utils.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
"""Of activations, by precision."""


def new_model(
    config: ModelConfig,
    recipe: Recipe,
    base_model: Path | None,
    weights: Mapping[str, Tensor] | None,
) -> Transformer:
    """The whole model with fp32 weights on the CPU: `weights` if given, else those of `base_model`,
    else new ones. With LoRA those of `base_model` in the products' dtype, and `weights` are its
    updates.
    They may be views of files: `parallel.parallelize` gives them memory. Where attention alone
    is trained, the matrices that stay have the products' dtype.
    """
    if recipe.lora is not None:
        assert base_model is not None
        model = load_base_model(base_model, config, base_dtype(recipe))
        add_lora(model, recipe.lora, seed=recipe.seed, origin=recipe.name)
        model.load_state_dict(weights or {}, strict=False, assign=True)
    elif weights is not None:
        with torch.device("meta"):
            model = Transformer(config)
            stack_experts(model)
        state = {name: weights[name] for name in model.state_dict()}
        model.load_state_dict(state, assign=True)
    elif base_model is not None:
        model = load_base_model(base_model, config, "fp32")
    else:
        model = Transformer(config)
        init_weights(model, seed=recipe.seed)
        stack_experts(model)
    if recipe.trainable == "attention":
        freeze_all_but_attention(model)
        cast_frozen(model, DTYPES[recipe.precision])
    if recipe.precision == "fp8":
        use_fp8(model)
    use_fused_layers(model)
    if recipe.activation_checkpointing == "full":
        checkpoint_activations(model)
    return model


def new_passes(
    model: Transformer,
    mesh: ProcessMesh,
    *,
    device: str,
    dtype: torch.dtype,
    sequence_length: int,
    teacher: Teacher | None = None,
) -> tuple[Passes, ShardedParameters]:
    """Lay out `model`, which is whole, over `mesh`; passes over it with activations of `dtype`.
    `teacher`, which every process has whole, does not go with a pipeline.
    """
    if mesh.size("pipeline") == 1:
        sharded = parallelize(model, mesh, device=device, dtype=dtype)
        return PlainPasses(model, dtype, mesh, teacher), sharded
    # Seconds of imports that no other run needs.
    from lowlat.train.pipeline.passes import PipelinePasses

    passes = PipelinePasses(model, mesh, dtype=dtype, sequence_length=sequence_length)
    sharded = parallelize(
        model, mesh, device=device, dtype=dtype, roots=passes.modules, copies=passes.copies
    )
    return passes, sharded


def new_teacher(path: Path, recipe: Recipe) -> Teacher:
    """The checkpoint `path` as the teacher of `recipe`, its weights in the products' dtype."""
    assert recipe.distillation is not None
    model = load_model(path, dtype=base_dtype(recipe)).model
    _require_finite(model, f"distillation.teacher {path}")
    stack_experts(model)
    use_fused_layers(model)
    return Teacher(
        model.to(recipe.device),
        DTYPES[recipe.precision],
        cross_entropy=recipe.distillation.cross_entropy_weight,
    )


def new_optimizer(
    model: Transformer,
    recipe: Recipe,
    tensors: MutableMapping[str, Tensor],
    sharded: ShardedParameters,
) -> Optimizer:
    """The optimiser, with the (whole) state that it takes out of `tensors`, if there is one."""
    optimizer = Optimizer(model, recipe.optimizer, sharded)
    if tensors:
        optimizer.load(tensors)
    return optimizer


def load_base_model(base_model: Path, config: ModelConfig, dtype: str) -> Transformer:
    """Load the checkpoint `base_model` in `dtype`, experts stacked, into a model of `config`, whose
    RoPE scaling may differ from the checkpoint's.
    """
    loaded = load_model(base_model, dtype=dtype).model
    _require_finite(loaded, f"base_model {base_model}")
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    stack_experts(model)
    return model


def _require_finite(model: Transformer, what: str) -> None:
    """Raises UserError for weights that no lower rate makes numbers of."""
    for name, weight in model.named_parameters():
        # Unlike isfinite, without a mask of the weight's size; NaN comes through.
        if weight.numel() and not all(map(torch.isfinite, weight.detach().aminmax())):
            raise UserError(
                f"{what}: '{name}' holds values that are not finite; give a whole model"
            )
