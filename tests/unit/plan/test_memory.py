"""What a device holds: states by hand, activations against what autograd really keeps."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lowlat.attention.flash import FlashAttention
from lowlat.config.model import ModelConfig
from lowlat.model.init import init_weights
from lowlat.model.transformer import Transformer
from lowlat.ops import native_training_kernels
from lowlat.plan.activations import layer_bytes
from lowlat.plan.job import ParallelLayout, Precision, TrainingJob
from lowlat.plan.memory import MemoryEstimate, device_memory
from lowlat.plan.stages import cut, held
from lowlat.train.cost.dry_run import require_fit
from lowlat.train.layers.fused import use_fused_layers
from lowlat.train.layers.stacked_experts import stack_experts
from lowlat.train.recipe.schema import parse_recipe
from lowlat.train.step.lora import EXPERT_PROJECTIONS, add_lora, is_lora_parameter
from tests.configs import GQA, MLA, PLAIN_MOE
from tests.fakes import gqa_config, mla_config
from tests.lowlat_configs import GLA

JOB = TrainingJob(
    sequence_length=128, batch_size=8, precision="fp32", layout=ParallelLayout(zero=0)
)
LATENT = replace(
    MLA,
    kv_lora_rank=37,
    q_lora_rank=53,
    qk_nope_head_dim=24,
    qk_rope_head_dim=8,
    v_head_dim=24,
)
MIXTURE = replace(PLAIN_MOE, moe_intermediate_size=41)
WIDE = {"hidden_size": 96, "intermediate_size": 131, "num_hidden_layers": 3, "vocab_size": 263}
SPARSE = mla_config(attention=LATENT, moe=MIXTURE, num_nextn_predict_layers=0, **WIDE)
DENSE = gqa_config(attention=replace(GQA, head_dim=16), **WIDE)
LAYERS = replace(
    SPARSE,
    moe=None,
    model_type="lowlat",
    attention=(
        LATENT,
        replace(LATENT, kv_lora_rank=167, qk_nope_head_dim=56),
        replace(LATENT, kv_lora_rank=11, q_lora_rank=None, qk_rope_head_dim=14),
    ),
)
GATED = replace(
    SPARSE, moe=None, model_type="lowlat", attention=replace(LATENT, attn_output_gate=True)
)
MLRA = replace(GATED, attention=replace(GLA, sum_groups=True))


def kept_bytes(model: nn.Module, hidden: Tensor, lengths: list[int], *, casts: bool = True) -> int:
    """Bytes of the distinct tensors that the layers keep for their backward passes, without
    parameters and, unless stated otherwise, their casts.
    """
    sizes: dict[int, tuple[int, Tensor]] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {p.shape for p in model.parameters()} | {p.shape[::-1] for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in parameters and not (casts and tensor.shape in shapes):
            sizes[memory.data_ptr()] = (memory.nbytes(), tensor)
        return tensor

    attention = FlashAttention(lengths)
    assert isinstance(model, Transformer)
    tables = model.rotary(attention.positions())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for number, layer in enumerate(model.layers):
            hidden = layer(hidden, model.rotary.of(number, tables), attention)
    return sum(size for size, _ in sizes.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "config",
    [SPARSE, DENSE, LAYERS, GATED, MLRA],
    ids=["sparse", "dense", "layers", "gated", "mlra"],
)
def test_activations_are_what_autograd_keeps(
    config: ModelConfig, precision: Precision, monkeypatch: pytest.MonkeyPatch
):
    """Regression: a module that keeps something the estimate does not know of, or the reverse.

    The estimate is of PyTorch's attention; the native one keeps values as narrow as they are.
    """
    monkeypatch.setattr(native_training_kernels, "usable", lambda *tensors: False)
    torch.manual_seed(3)
    model = Transformer(config)
    init_weights(model, seed=5)
    if config.moe is not None:
        stack_experts(model)
    use_fused_layers(model)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    hidden = torch.randn(4 * 128, 96).to(dtype).requires_grad_()
    job = replace(JOB, precision=precision)
    layers = range(config.num_hidden_layers)
    estimated = sum(sum(layer_bytes(config, layer, job).values()) for layer in layers)
    assert kept_bytes(model, hidden, [128] * 4) == pytest.approx(4 * 128 * estimated, rel=0.05)


ATTENTIONS = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("modules", [ATTENTIONS, (*ATTENTIONS, *EXPERT_PROJECTIONS)])
def test_what_updates_keep(
    modules: tuple[str, ...], precision: Precision, monkeypatch: pytest.MonkeyPatch
):
    """Regression: experts whose weights with their updates are as large as the model itself."""
    monkeypatch.setattr(native_training_kernels, "usable", lambda *tensors: False)
    model = Transformer(SPARSE)
    init_weights(model, seed=5)
    stack_experts(model)
    lora = {"rank": 7, "alpha": 1.0, "target_modules": modules}
    recipe = parse_recipe(
        {
            "name": "r",
            "base_model": "base",
            "precision": precision,
            "data": {"folder": "tokens"},
            "lora": lora,
            "phase": [
                {
                    "name": "p",
                    "steps": 1,
                    "sequence_length": 128,
                    "batch_size": 4,
                    "micro_batch_size": 4,
                    "learning_rate": [{"to": 1.0}],
                }
            ],
        },
        origin="r",
    )
    assert recipe.lora is not None
    add_lora(model, recipe.lora, seed=3)
    use_fused_layers(model)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    for name, parameter in model.named_parameters():
        if not is_lora_parameter(name):
            parameter.data = parameter.data.to(dtype)
    found = require_fit(SPARSE, recipe, memory_bytes=2**40)
    hidden = torch.randn(4 * 128, 96).to(dtype).requires_grad_()
    assert kept_bytes(model, hidden, [128] * 4, casts=False) == pytest.approx(
        found.parts["activations"], rel=0.05
    )


def memory(job: TrainingJob, config: ModelConfig = SPARSE) -> MemoryEstimate:
    costs = (1.0,) * (config.num_hidden_layers + 1)
    return device_memory(config, job, held(cut(config, job.layout, costs), job.layout))


def test_embedding_and_head_are_whole_where_they_are_not_divided():
    """As lowlat's trainer has them. Regression: a recipe that passes and runs out of memory."""
    job = replace(JOB, layout=ParallelLayout(tensor=2))
    divided = memory(job)
    whole = memory(replace(job, layout=ParallelLayout(tensor=2, divides_tables=False)))
    for part in ("embedding", "head"):
        assert whole.parameters[part] == 2 * divided.parameters[part]
    assert whole.parameters["attention"] == divided.parameters["attention"]
    assert whole.parts["loss"] > divided.parts["loss"]


def test_every_layers_activations_are_its_own():
    """Of layers that differ, in whatever order. Regression: all taken for the last one."""
    heads = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    wide = replace(MLA, num_attention_heads=6, kv_lora_rank=64, q_lora_rank=None, **heads)
    narrow = replace(wide, kv_lora_rank=16)
    kept = [
        memory(JOB, replace(SPARSE, attention=each, num_hidden_layers=3)).activations
        for each in ((wide, wide, narrow), (narrow, wide, wide), (wide, wide, wide))
    ]
    assert sum(kept[0].values()) == pytest.approx(sum(kept[1].values()))
    assert sum(kept[0].values()) < sum(kept[2].values())


def test_states_by_hand():
    found = memory(JOB)
    count = sum(found.parameters.values())
    assert found.parts["weights"] == found.parts["gradients"] == 4 * count
    assert found.parts["optimizer"] == 8 * count
    assert found.parts["cast weights"] == 0
    ends = sum(found.parameters[part] for part in ("embedding", "head", "router", "norms"))
    muon = memory(replace(JOB, optimizer="muon"))
    assert muon.parts["optimizer"] == pytest.approx(4 * (count - ends) + 8 * ends)
    half = memory(replace(JOB, moments="bf16"))
    assert half.parts["optimizer"] == 4 * count


@pytest.mark.parametrize(
    ("zero", "whole"),
    [(1, ("gradients", "cast weights")), (2, ("cast weights",)), (3, ())],
)
def test_zero_divides_more_and_more(zero: int, whole: tuple[str, ...]):
    base = replace(JOB, precision="bf16", batch_size=64)
    alone = memory(replace(base, layout=ParallelLayout(fsdp=1, zero=1)))
    shared = memory(replace(base, layout=ParallelLayout(fsdp=8, zero=zero)))  # pyright: ignore[reportArgumentType]
    for part in ("weights", "optimizer", "gradients"):
        factor = 1 if part in whole else 8
        assert shared.parts[part] == pytest.approx(alone.parts[part] / factor)
    expected = alone.parts["cast weights"] if "cast weights" in whole else 0
    assert shared.parts["cast weights"] == expected


def test_experts_have_fewer_replicas_to_share_with():
    """Five devices hold an expert each: no other has the same, so nothing of it is shared."""
    job = replace(
        JOB, precision="bf16", batch_size=40, layout=ParallelLayout(fsdp=5, expert=5, zero=1)
    )
    found = memory(job)
    routed = found.parameters["routed experts"]
    rest = sum(found.parameters.values()) - routed
    assert found.parts["optimizer"] == pytest.approx(8 * (routed + rest / 5))


def test_recomputing_layers_keeps_their_inputs_alone():
    found = memory(replace(JOB, activation_checkpointing="full"))
    assert found.activations == {"layer input": 128 * 96 * 4 * 3}
    assert found.parts["activations"] < memory(JOB).parts["activations"] / 10


def test_selective_recomputation_lies_between():
    sizes = [
        memory(replace(JOB, kernels="fused", activation_checkpointing=how)).parts["activations"]
        for how in ("none", "selective", "full")
    ]
    assert sizes[0] > 1.3 * sizes[1] > sizes[2]


def test_the_first_stage_of_1f1b_holds_most_activations():
    config = replace(DENSE, num_hidden_layers=4)
    job = replace(JOB, sequence_length=1024, layout=ParallelLayout(pipeline=4, zero=0))
    found = memory(job, config)
    assert found.rank == 0
    assert found.largest == "activations"
    per_layer = sum(layer_bytes(config, 0, job).values())
    assert found.parts["activations"] == pytest.approx(4 * 1024 * per_layer)
