"""fp8 storage inside the model: ragged blocks, what stays plain, and that the multiply sees the
exact weight.
"""

import pytest
import torch

from lowlat.config.model import QuantConfig
from lowlat.model.linear import Linear, block_grid
from lowlat.model.mla import MLA
from lowlat.model.quant import packed_type, store_packed
from lowlat.model.transformer import Transformer
from lowlat.ops.fp8 import dequantize_blocks, quantize_blocks
from tests.packed_attention import PackedAttention

from .draw import mla_config, random_model

QUANT = QuantConfig(weight_block_size=(8, 5))
FP8 = torch.float8_e4m3fn


def quantized_like(plain: Transformer, config: QuantConfig) -> tuple[Transformer, Transformer]:
    """The fp8 version of a model, and a plain fp64 model with its exact dequantized weights."""
    fields = {"num_nextn_predict_layers": 1, "quantization": config}
    twin = Transformer(mla_config(**fields), dtype=torch.float64).requires_grad_(False)
    state = twin.state_dict()
    exact = {}
    for name, value in plain.state_dict().items():
        if state[name].dtype != FP8:
            state[name].copy_(value)
            continue
        scale_name = f"{name}_scale_inv"
        weight, scale = quantize_blocks(value.float(), config.weight_block_size)
        state[name].copy_(weight)
        state[scale_name].copy_(scale)
        exact[name] = dequantize_blocks(
            state[name], state[scale_name], config.weight_block_size, torch.float64
        )
    dense = random_model(mla_config(num_nextn_predict_layers=1))
    dense.load_state_dict(plain.state_dict() | exact)
    return twin, dense


def test_block_grid_is_a_ceil_grid() -> None:
    assert block_grid(576, 7168, (128, 128)) == (5, 56)
    assert block_grid(128, 129, (128, 128)) == (1, 2)


def test_fp8_model_equals_the_dequantized_model() -> None:
    """The stored blocks are multiplied exactly: absorbed up-projections too are not rounded a
    second time.
    """
    plain = random_model(mla_config(num_nextn_predict_layers=1))
    twin, dense = quantized_like(plain, QUANT)
    ids, backend = torch.randint(0, 41, (11,)), PackedAttention([11])
    with torch.no_grad():
        out = twin.logits(twin(ids, backend.positions(), backend))
        expected = dense.logits(dense(ids, backend.positions(), backend))
        before = plain.logits(plain(ids, backend.positions(), backend))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    assert (out - before).abs().max() > 1e-3


def test_which_parameters_are_fp8() -> None:
    """Projections and experts are; embedding, head, norms, gate, bias and eh_proj are not."""
    model = Transformer(mla_config(num_nextn_predict_layers=1, quantization=QUANT))
    plain = {name for name, value in model.state_dict().items() if value.dtype != FP8}
    plain = {name for name in plain if not name.endswith("_scale_inv")}
    for name in plain:
        last = name.split(".")[-2]
        assert last in {"embed_tokens", "lm_head", "gate", "eh_proj"} or "norm" in last, name
    dtypes = {name: value.dtype for name, value in model.state_dict().items()}
    assert dtypes["layers.0.self_attn.kv_b_proj.weight"] == FP8
    assert dtypes["layers.1.mlp.experts.7.down_proj.weight"] == FP8
    assert dtypes["mtp.0.block.mlp.shared_experts.up_proj.weight"] == FP8
    assert dtypes["layers.1.mlp.gate.e_score_correction_bias"] == torch.float32


def test_modules_kept_by_name() -> None:
    """config.json may list modules, whole layers, or an MTP layer by its number in files."""
    kept = ("model.layers.0", "model.layers.1.self_attn.o_proj", "model.layers.2.mlp")
    quant = QuantConfig(weight_block_size=(8, 5), modules_to_not_convert=kept)
    model = Transformer(mla_config(num_nextn_predict_layers=1, quantization=quant))
    dtypes = {name: value.dtype for name, value in model.state_dict().items()}
    assert not any(d == FP8 for name, d in dtypes.items() if name.startswith("layers.0."))
    assert dtypes["layers.1.self_attn.o_proj.weight"] != FP8
    assert dtypes["layers.1.self_attn.kv_b_proj.weight"] == FP8
    assert dtypes["mtp.0.block.mlp.experts.7.up_proj.weight"] != FP8
    assert dtypes["mtp.0.block.self_attn.o_proj.weight"] == FP8


def test_a_name_does_not_keep_its_longer_namesakes() -> None:
    quant = QuantConfig(modules_to_not_convert=("model.layers.1",))
    model = Transformer(mla_config(num_hidden_layers=12, quantization=quant))
    attention = model.layers[11].self_attn
    assert isinstance(attention, MLA) and attention.o_proj.weight.dtype == FP8


def test_fp8_shapes() -> None:
    linear = Linear(23, 17, dtype=torch.bfloat16)
    linear.store_fp8(QUANT)
    assert linear.weight.shape == (17, 23) and linear.weight.dtype == FP8
    assert linear.weight_scale_inv is not None
    assert linear.weight_scale_inv.shape == (3, 5)
    assert linear.weight_scale_inv.dtype == torch.float32
    assert not linear.weight.requires_grad and not linear.weight_scale_inv.requires_grad


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_which_projections_are_packed(name: str) -> None:
    """kv_b_proj is rows; of an int4 model head and eh_proj are int8; all others are `name`."""
    model = Transformer(mla_config(num_nextn_predict_layers=1, mtp_copies=True))
    assert packed_type(model) is None
    packed = store_packed(model, name)
    assert packed_type(model) == name
    linears = {n: m for n, m in model.named_modules() if isinstance(m, Linear)}
    assert packed == {f"{n}.weight": module for n, module in linears.items()}
    others = {"kv_b_proj": "int8_rows"}
    if name == "int4":
        others |= dict.fromkeys(["lm_head", "head", "eh_proj"], "int8")
    for path, module in linears.items():
        assert module.storage == others.get(path.split(".")[-1], name), path
    state = model.state_dict()
    assert state["embed_tokens.weight"].is_floating_point()
    assert state["layers.1.mlp.gate.weight"].is_floating_point()
    assert state["mtp.0.block.mlp.experts.7.up_proj.weight"].dtype == torch.uint8


def test_a_tied_model_gets_a_head() -> None:
    model = Transformer(mla_config(tie_word_embeddings=True))
    assert model.lm_head is None
    model.add_head()
    assert model.lm_head is not None
    head = model.lm_head
    assert (head.in_features, head.out_features) == (23, 41)
    model.add_head()
    assert model.lm_head is head


def test_fp8_on_meta_stays_on_meta() -> None:
    with torch.device("meta"):
        model = Transformer(mla_config(quantization=QUANT))
    assert all(parameter.is_meta for parameter in model.parameters())
