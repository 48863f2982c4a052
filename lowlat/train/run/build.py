"""Construction of model, parallelism and optimizer for a recipe: new, from a base model, or from a
training checkpoint.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lowlat.checkpoint.load import load_model
from lowlat.checkpoint.mapping import file_name, mtp_copies
from lowlat.config.model import ModelConfig
from lowlat.model.init import init_weights
from lowlat.model.transformer import Transformer
from lowlat.train.layers.fp8 import use_fp8
from lowlat.train.layers.fused import checkpoint_activations, use_fused_layers
from lowlat.train.layers.sparse_mla import use_sparse_training
from lowlat.train.layers.stacked_experts import stack_experts
from lowlat.train.parallel.mesh import ProcessMesh
from lowlat.train.parallel.parallelize import ShardedParameters, parallelize
from lowlat.train.recipe.schema import Phase, Recipe
from lowlat.train.step.lora import add_lora, base_dtype
from lowlat.train.step.passes import Passes, PlainPasses
from lowlat.train.step.teacher import Teacher
from lowlat.train.step.trainable import cast_frozen, freeze_all_but_attention
from lowlat.utils.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
"""Dtype of activations by precision. Modules cast explicitly, without autocast."""


def new_model(
    config: ModelConfig,
    recipe: Recipe,
    base_model: Path | None,
    weights: Mapping[str, Tensor] | None,
    phase: Phase,
) -> Transformer:
    """The full model for `phase` on the CPU: with `weights` if given, else those of `base_model`,
    else initialized.

    Trainable weights are fp32. With LoRA, `weights` are the updates and the base model has the
    dtype of matrix products, as have the frozen matrices of trainable = 'attention'. Weights may be
    memory-mapped; `parallel.parallelize` copies them.
    """
    if recipe.lora is not None:
        assert base_model is not None
        model = load_base_model(base_model, config, base_dtype(recipe))
        add_lora(model, recipe.lora, seed=recipe.seed)
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
    if config.is_sparse:
        use_sparse_training(model, phase.dsa_stage or "sparse")
    if recipe.activation_checkpointing == "full" and not phase.is_warmup:
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
    """Parallelize the full `model` over `mesh`; returns its forward and backward passes, with
    activations of `dtype`, and its sharded parameters.

    Every process holds the full `teacher`; pipeline parallelism does not support one.
    """
    if mesh.size("pipeline") == 1:
        sharded = parallelize(model, mesh, device=device, dtype=dtype)
        return PlainPasses(model, dtype, mesh, teacher), sharded
    # Imported here because the import takes seconds and only pipeline runs need it.
    from lowlat.train.pipeline.passes import PipelinePasses

    passes = PipelinePasses(model, mesh, dtype=dtype, sequence_length=sequence_length)
    sharded = parallelize(
        model, mesh, device=device, dtype=dtype, roots=passes.modules, copies=passes.copies
    )
    return passes, sharded


def new_teacher(path: Path, recipe: Recipe) -> Teacher:
    """Load the checkpoint `path` as the teacher of `recipe`, in the dtype of matrix products."""
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


def load_base_model(base_model: Path, config: ModelConfig, dtype: str) -> Transformer:
    """Load the checkpoint `base_model` in `dtype` into a model of `config`, with stacked experts.

    The RoPE scaling of `config` may differ from the checkpoint's. Copies of embedding and head in
    MTP modules are dropped, because V3 shares both with the main model. Raises UserError if one
    differs from the main model's.
    """
    loaded = load_model(base_model, dtype=dtype)
    _require_finite(loaded.model, f"base_model {base_model}")
    weights = loaded.model.state_dict()
    if loaded.config.mtp_copies:
        for name, shared in mtp_copies(loaded.config, weights).items():
            if not torch.equal(weights.pop(name), shared):
                raise UserError(
                    f"base_model {base_model}: tensor '{file_name(config, name)}' differs from the "
                    "main model's, which the MTP modules share in training; replace it by a copy"
                )
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(weights, assign=True)
    stack_experts(model)
    return model


def _require_finite(model: Transformer, what: str) -> None:
    """Raises UserError if a weight is NaN or infinite."""
    for name, weight in model.named_parameters():
        # aminmax propagates NaN and, unlike isfinite, needs no mask of the weight's size.
        if weight.numel() and not all(map(torch.isfinite, weight.detach().aminmax())):
            raise UserError(
                f"{what}: '{name}' has values that are not finite; use an intact checkpoint"
            )
