"""Models trained in FP8 and the checkpoints they save."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from lowlat.attention.flash import FlashAttention
from lowlat.checkpoint.load import load_model
from lowlat.checkpoint.save import save_model
from lowlat.config.model import GLAConfig, MLAConfig, ModelConfig, QuantConfig
from lowlat.model.linear import Linear
from lowlat.model.mla import MLA
from lowlat.model.quant import store_packed
from lowlat.model.replace_modules import replace_modules
from lowlat.model.transformer import Transformer
from lowlat.ops.fp8 import quantize_blocks
from lowlat.ops.fp8_training import ScaleFormat
from lowlat.train.layers.fp8 import Fp8Experts, Fp8Linear, Fp8MLA, use_fp8
from lowlat.train.layers.stacked_experts import stack_experts, unstacked
from lowlat.train.run.export import save_fp8
from lowlat.utils.errors import UserError
from tests.configs import PLAIN_MOE
from tests.fakes import gqa_config, mla_config, tiny_model
from tests.packed_attention import PackedAttention

MOE = replace(PLAIN_MOE, moe_intermediate_size=131)


def config(**changes: object) -> ModelConfig:
    """A deepseek_v3 with experts and an MTP module whose matrices end within blocks."""
    wide = {"hidden_size": 137, "moe": MOE, "num_nextn_predict_layers": 1, "initializer_range": 0.1}
    return mla_config(**(wide | changes))


def trained(config: ModelConfig, scale_fmt: ScaleFormat = None) -> Transformer:
    """With stacked experts, as training has them."""
    model = tiny_model(config, torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("e_score_correction_bias"):
            parameter.data = torch.randn_like(parameter)
    stack_experts(model)
    use_fp8(model, scale_fmt)
    return model


def logits(model: Transformer, ids: Tensor) -> Tensor:
    """Of the main head and of the MTP module, over two sequences."""
    attention = FlashAttention([17, 14])
    positions = attention.positions()
    hidden = model(ids, positions, attention)
    main = model.logits(hidden)
    if not len(model.mtp):
        return main
    ahead = model.mtp_hidden(0, hidden, ids.roll(-1), positions, attention)
    return torch.cat([main, model.mtp_logits(0, ahead)])


def saved(model: Transformer, config: ModelConfig, dst: Path, **options: object) -> None:
    masters = dict(unstacked(model.state_dict()))
    save_fp8(config, masters, dst, source=None, **options)  # pyright: ignore[reportArgumentType]


def test_what_runs_in_fp8() -> None:
    """All linear layers of attention and MLP; not head, gate and eh_proj (section 3.3.1)."""
    model = tiny_model(config(), torch.float32)
    use_fp8(model)
    plain = {n for n, m in model.named_modules() if type(m) is Linear}
    assert plain == {"lm_head", "mtp.0.eh_proj"}
    formats = {n: m.fmt for n, m in model.named_modules() if isinstance(m, Fp8Linear)}
    after = formats["layers.0.self_attn.o_proj"]
    assert (after.input_scales, after.saved_input, after.weight_scales) == ("ue8m0", "e5m6", None)
    assert formats["layers.1.mlp.experts.3.up_proj"].input_scales == "ue8m0"
    assert formats["layers.1.mlp.experts.3.down_proj"].gradient_scales == "ue8m0"
    shared = formats["mtp.0.block.mlp.shared_experts.up_proj"]
    assert shared == formats["layers.0.mlp.down_proj"]
    assert (shared.input_scales, shared.gradient_scales, shared.saved_input) == (None, None, "e4m3")


def test_every_product_of_a_layer_is_rounded() -> None:
    """Weights nudged by less than half a step of fp8 change nothing, kv_b_proj's and the stacked
    experts' included.

    Regression: a layer that is left out of FP8 unnoticed.
    """
    model = trained(config(num_nextn_predict_layers=0), "ue8m0")
    ids = torch.randint(0, 263, (31,))
    before = logits(model, ids)
    for name, parameter in model.named_parameters():
        if "proj" in name:
            # Scales are powers of two: a step is at least 2^-4 of a value, and half of it 2^-5.
            on_grid = torch.where(parameter.abs() < 2e-3, 0.0, parameter)
            mantissa, exponent = torch.frexp(on_grid)
            on_grid = torch.ldexp((mantissa * 16).round() / 16, exponent)
            parameter.data = on_grid
    middle = logits(model, ids)
    assert not torch.equal(before, middle)
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter.data = parameter * (1 + 2.0**-8)
    after = logits(model, ids)
    assert torch.equal(middle, after)


@pytest.mark.parametrize("v_head_dim", [3, 40])
@pytest.mark.parametrize("backend", [FlashAttention, PackedAttention])
def test_expanded_attention_is_mla(
    backend: type[FlashAttention | PackedAttention], v_head_dim: int
) -> None:
    """Keys and values through kv_b_proj give what up-projections inside attention give, when
    nothing is rounded, and whichever are wider.
    """
    attention = replace(config().attention, v_head_dim=v_head_dim)
    model = tiny_model(config(attention=attention), torch.float64)
    ids, attention = torch.randint(0, 263, (31,)), backend([17, 14])
    absorbed = model(ids, attention.positions(), attention)
    for module in model.modules():
        if isinstance(module, Linear):
            module.forward = lambda x, m=module: F.linear(x, m.weight)
    replace_modules(model, lambda _path, m: Fp8MLA(m) if isinstance(m, MLA) else None)
    expanded = model(ids, attention.positions(), attention)
    torch.testing.assert_close(expanded, absorbed, rtol=1e-10, atol=1e-10)


def test_stacked_experts_are_the_single_ones() -> None:
    """Sums in another order apart, both forms multiply the same fp8 numbers."""
    single = tiny_model(config(), torch.float32)
    use_fp8(single)
    model = trained(config())
    model.load_state_dict(
        {n: p for n, p in model.state_dict().items() if "e_score" in n}, strict=False
    )
    for name, parameter in single.named_parameters():
        if name.endswith("e_score_correction_bias"):
            parameter.data = model.state_dict()[name].clone()
    experts = [m for m in model.modules() if isinstance(m, Fp8Experts)]
    assert len(experts) == 2
    ids = torch.randint(0, 263, (31,))
    torch.testing.assert_close(logits(model, ids), logits(single, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_an_export_computes_what_training_computes(scale_fmt: ScaleFormat, tmp_path: Path) -> None:
    """In FP8 the loaded model gives the trained model's logits bit for bit. With its weights alone
    in fp8, as it is served, it stays within what 3 bits of mantissa of the activations do.
    """
    model, ids = trained(config(), scale_fmt), torch.randint(0, 263, (31,))
    saved(model, config(), tmp_path / "out", scale_fmt=scale_fmt, dtype=torch.float32)
    with torch.no_grad():
        expected = logits(model, ids)
        loaded = load_model(tmp_path / "out")
        served = logits(loaded.model, ids)
        assert (served - expected).norm() < 0.15 * expected.norm()
        use_fp8(loaded.model, scale_fmt)
        # Experts are single here: their weighted sum is the same, in the same order.
        torch.testing.assert_close(logits(loaded.model, ids), expected, rtol=1e-6, atol=1e-6)


def test_the_layout_is_the_released_one(tmp_path: Path) -> None:
    """fp8 with weight_scale_inv on the ceil grid; embedding, head, gate, norms and eh_proj in bf16;
    router biases in fp32; quantization_config in config.json.
    """
    model = trained(config())
    saved(model, config(), tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["quantization_config"] == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    assert raw["dtype"] == "bfloat16"
    masters = dict(unstacked(model.state_dict()))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    layer, mtp = "model.layers.1.", "model.layers.2."
    assert dtypes["model.embed_tokens.weight"] == dtypes["lm_head.weight"] == torch.bfloat16
    assert dtypes[layer + "mlp.gate.weight"] == dtypes[mtp + "eh_proj.weight"] == torch.bfloat16
    assert dtypes[layer + "self_attn.q_a_layernorm.weight"] == torch.bfloat16
    assert dtypes[layer + "mlp.gate.e_score_correction_bias"] == torch.float32
    assert dtypes[mtp + "self_attn.kv_b_proj.weight"] == torch.float8_e4m3fn
    for name in (
        "mlp.experts.3.up_proj",
        "self_attn.kv_a_proj_with_mqa",
        "mlp.experts.0.down_proj",
    ):
        values, scale = quantize_blocks(masters[f"layers.1.{name}.weight"], (128, 128))
        stored = tensors[f"{layer}{name}.weight"], tensors[f"{layer}{name}.weight_scale_inv"]
        assert torch.equal(stored[0].view(torch.uint8), values.view(torch.uint8))
        assert stored[1].dtype == torch.float32 and torch.equal(stored[1], scale)
    assert tensors[layer + "mlp.experts.3.up_proj.weight_scale_inv"].shape == (2, 2)
    assert tensors[layer + "self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (1, 2)
    scaled = {name.removesuffix("_scale_inv") for name in dtypes if name.endswith("_scale_inv")}
    assert scaled == {name for name, dtype in dtypes.items() if dtype == torch.float8_e4m3fn}


def test_scales_survive_saving_and_loading_bit_for_bit(tmp_path: Path) -> None:
    """Loaded and saved again, every byte is the same."""
    model = trained(config())
    saved(model, config(), tmp_path / "first")
    loaded = load_model(tmp_path / "first")
    save_model(loaded.model, loaded.config, tmp_path / "second", source=None)
    first, second = (load_model(tmp_path / name).model.state_dict() for name in ("first", "second"))
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8)), name


def test_llama_trains_and_exports_too(tmp_path: Path) -> None:
    """The baselines of a study run in the same precision."""
    small = gqa_config(hidden_size=131)
    model = tiny_model(small, torch.float32)
    use_fp8(model)
    ids = torch.randint(0, 263, (31,))
    save_fp8(small, model.state_dict(), tmp_path / "out", source=None, dtype=torch.float32)
    loaded = load_model(tmp_path / "out").model
    use_fp8(loaded)
    with torch.no_grad():
        torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=0, atol=0)


def test_the_up_projection_of_gla_stays_as_it_is() -> None:
    """Attention multiplies with it, not a linear layer."""
    attention = mla_config().attention
    assert isinstance(attention, MLAConfig)
    sizes = {f: getattr(attention, f) for f in ("q_lora_rank", "qk_nope_head_dim", "v_head_dim")}
    grouped = GLAConfig(
        num_attention_heads=6,
        kv_lora_rank=22,
        num_latent_groups=2,
        qk_rope_head_dim=6,
        **sizes,
    )
    model = tiny_model(
        mla_config(model_type="lowlat", attention=grouped, num_nextn_predict_layers=0),
        torch.float32,
    )
    use_fp8(model)
    plain = {n for n, m in model.named_modules() if type(m) is Linear}
    assert plain == {"lm_head", "layers.0.self_attn.kv_b_proj", "layers.1.self_attn.kv_b_proj"}
    assert logits(model, torch.randint(0, 263, (31,))).isfinite().all()


def test_weights_it_cannot_multiply_are_refused() -> None:
    model = tiny_model(config(), torch.float32)
    store_packed(model, "int8")
    with pytest.raises(UserError, match=r"q_a_proj is int8; load the model with --dtype fp32"):
        use_fp8(model)
    blocks = QuantConfig(weight_block_size=(64, 64))
    with torch.device("meta"):
        model = Transformer(config(quantization=blocks))
    with pytest.raises(UserError, match=r"q_a_proj is fp8 in blocks of \(64, 64\)"):
        use_fp8(model)


def test_a_weight_that_is_not_finite_is_not_exported(tmp_path: Path) -> None:
    model = trained(config())
    masters = dict(unstacked(model.state_dict()))
    masters["layers.0.mlp.up_proj.weight"][3, 5] = torch.nan
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj\.weight .* not finite"):
        save_fp8(config(), masters, tmp_path / "out", source=None)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_training_follows_fp32(scale_fmt: ScaleFormat) -> None:
    """Steps on one text: the loss falls as in fp32, and every weight gets a gradient."""
    small = config(initializer_range=0.02, num_nextn_predict_layers=0)
    ids, losses = torch.randint(0, 263, (31,)), {}
    for is_fp8 in (False, True):
        model = tiny_model(small, torch.float32)
        stack_experts(model)
        if is_fp8:
            use_fp8(model, scale_fmt)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        losses[is_fp8] = []
        for _ in range(10):
            loss = F.cross_entropy(logits(model, ids)[:-1], ids[1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[is_fp8].append(loss.item())
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad is not None and bool(p.grad.any()) for p in trained)
    assert losses[True][-1] < 0.5 * losses[True][0]
    assert losses[True] != losses[False]
    ratio = torch.tensor(losses[True]) / torch.tensor(losses[False])
    assert (ratio - 1).abs().max() < 0.05


def test_a_config_keeps_its_other_fields(tmp_path: Path) -> None:
    model = trained(config())
    written = save_fp8(config(), dict(unstacked(model.state_dict())), tmp_path / "out", source=None)
    assert replace(written, quantization=None) == config()
    assert load_model(tmp_path / "out").config == written
