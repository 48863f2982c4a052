"""GLA, GTA, MLA whose layers differ and GQA with experts through the native step, as near to fp32
as plain bf16; TPA has no native form and runs in PyTorch.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowlat.attention.cache import PagedCache
from lowlat.attention.metadata import AttentionBatch, SequenceSlice
from lowlat.config.model import ModelConfig, QuantConfig
from lowlat.engine import scoring
from lowlat.engine.runner import ModelRunner
from lowlat.model.block import DecoderLayer
from lowlat.model.linear import Linear
from lowlat.model.native import NativeModel, supports_native
from lowlat.model.quant import store_packed
from lowlat.model.transformer import Transformer
from lowlat.ops import native
from lowlat.train.layers.lora import LoraLinear, LowRank
from tests.lowlat_configs import EVERY, YARN, random_model
from tests.native.test_step import distances, native_logits, plain_logits
from tests.parameters import slow_except

if not native.available():
    pytest.skip(native.reason(), allow_module_level=True)

PYTORCH_ONLY = ("tpa", "tpa-kv", "combined tpa", "gated")
CONFIGS = {
    name: replace(config, num_nextn_predict_layers=0)
    for name, config in EVERY.items()
    if name not in PYTORCH_ONLY
}
QUICK = ("gla-2", "mlra", "gta-3", "combined gqa", "combined mla", "layers all")
every_config = pytest.mark.parametrize("name", slow_except(QUICK, CONFIGS))


def in_fp32(model: Transformer, config: ModelConfig) -> Transformer:
    """The same weights multiplied out, in fp32."""
    exact = Transformer(replace(config, quantization=None), dtype=torch.float32)
    exact = exact.requires_grad_(False)
    values = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            values[f"{name}.weight"] = module.dense_weight(torch.float32)
    for name, parameter in exact.state_dict().items():
        parameter.copy_(values[name])
    return exact


def compare(model: Transformer, exact: Transformer, has_experts: bool) -> None:
    compiled = NativeModel(model)
    for break_even in (0.0, 2.0, math.inf):
        reference = plain_logits(exact, break_even)
        plain = distances(plain_logits(model, break_even), reference)
        ours = distances(native_logits(compiled, break_even), reference)
        assert ours.median() <= 1.4 * plain.median() + 1e-4
        assert ours.median() < 0.03
        if not has_experts:
            assert ours.max() <= 2 * plain.max() + 1e-3


@every_config
@torch.inference_mode()
def test_bf16(name: str) -> None:
    config = CONFIGS[name]
    model = random_model(config, torch.bfloat16)
    assert supports_native(model)
    compare(model, in_fp32(model, config), config.moe is not None)


@pytest.mark.parametrize("level", native.levels())
@pytest.mark.parametrize("name", ["gla-3", "layers all", "layers rope"])
@torch.inference_mode()
def test_latents_and_layers_at_every_level(name: str, level: str) -> None:
    """Norms of several latents; layers of other widths and frequencies than those around them."""
    config = CONFIGS[name]
    model = random_model(config, torch.bfloat16)
    used = native.level()
    native.module().set_level(level)
    try:
        compare(model, in_fp32(model, config), config.moe is not None)
    finally:
        native.module().set_level(used)


PACKED = ("gla-2", "gla-3", "gta-3", "combined gqa", "combined gta", "layers all", "layers experts")


@pytest.mark.parametrize("name", slow_except(QUICK, PACKED))
@pytest.mark.parametrize("dtype", ["int8", "int4"])
@torch.inference_mode()
def test_packed_weights(name: str, dtype: str) -> None:
    config = CONFIGS[name]
    dense = random_model(config, torch.bfloat16)
    model = Transformer(config, dtype=torch.bfloat16).requires_grad_(False)
    model.add_head()
    packed = store_packed(model, dtype)
    state = dense.state_dict()
    for weight, linear in packed.items():
        prefix = weight.removesuffix("weight")
        state |= {prefix + part: value for part, value in linear.pack(state[weight]).items()}
    model.load_state_dict(state, assign=True)
    assert supports_native(model)
    compare(model, in_fp32(model, config), config.moe is not None)


@pytest.mark.parametrize("name", ["gla-2", "layers all"])
@torch.inference_mode()
def test_fp8_blocks(name: str) -> None:
    """GLA's up-projections are multiplied out of their blocks before zeros go around them."""
    config = replace(CONFIGS[name], quantization=QuantConfig())
    model = Transformer(config, dtype=torch.bfloat16).requires_grad_(False)
    drawn = random_model(replace(config, quantization=None), torch.bfloat16).state_dict()
    for name, parameter in model.state_dict().items():
        if parameter.dtype == torch.float8_e4m3fn:
            parameter.copy_((drawn[name].float() * 64).to(torch.float8_e4m3fn))
        elif name.endswith("_scale_inv"):
            parameter.fill_(1 / 64)
        else:
            parameter.copy_(drawn[name])
    assert supports_native(model)
    compare(model, in_fp32(model, config), False)


@pytest.mark.parametrize("name", ["gla-2", "gta-3", "combined mha", "layers all"])
@torch.inference_mode()
def test_int8_cache(name: str) -> None:
    """Latents and tied states are int8, the rotary key is not; near to the bf16 cache."""
    config = CONFIGS[name]
    model = random_model(config, torch.bfloat16)
    ids = torch.randint(0, 263, (61,), generator=torch.Generator().manual_seed(5)).tolist()
    logits: dict[torch.dtype, Tensor] = {}
    for dtype in (torch.bfloat16, torch.int8):
        runner = ModelRunner(model, page_size=8, cache_dtype=dtype)
        logits[dtype] = scoring.logits(runner, ids, chunk=7)
    distance = distances(logits[torch.int8], logits[torch.bfloat16])
    assert 1e-5 < distance.median() < 0.1
    cache = PagedCache(config, num_pages=1, dtype=torch.int8)
    layers = range(config.num_hidden_layers)
    assert cache.quantized == [config.attention_of(layer).quantized_dim for layer in layers]


@pytest.mark.parametrize("name", PYTORCH_ONLY)
def test_what_falls_back(name: str) -> None:
    """Regression: a native form that would read the factors as something else."""
    config = EVERY[name]
    model = random_model(config, torch.bfloat16)
    assert not supports_native(model)
    exact = in_fp32(model, config)
    ids = torch.randint(0, 263, (61,), generator=torch.Generator().manual_seed(5)).tolist()
    logits, reference = (
        scoring.logits(ModelRunner(m, page_size=8), ids, chunk=7) for m in (model, exact)
    )
    assert distances(logits, reference).median() < 0.03


@torch.inference_mode()
def test_a_model_with_updates_falls_back() -> None:
    """Regression: a native form that leaves low-rank updates out."""
    config = CONFIGS["combined gqa"]
    model = random_model(config, torch.bfloat16)
    assert supports_native(model)
    layer = model.layers[0]
    assert isinstance(layer, DecoderLayer)
    projection = layer.self_attn.o_proj
    rows, columns = projection.out_features, projection.in_features
    update = LowRank(rank=2, rows=rows, columns=columns, scale=1.0)
    layer.self_attn.o_proj = LoraLinear(projection, update)
    assert not supports_native(model)


@torch.inference_mode()
def test_a_sequence_beyond_its_pages_is_refused() -> None:
    """Regression: a sum of start and length that overflows and looks small."""
    config = CONFIGS["combined gqa"]
    compiled = NativeModel(random_model(config, torch.bfloat16))
    cache = PagedCache(config, num_pages=1, page_size=8, dtype=torch.bfloat16)
    good = AttentionBatch.build([SequenceSlice(pages=(0,), start=0, length=3)], page_size=8)
    for start in (6, 2**63 - 1):
        beyond = (SequenceSlice(pages=(0,), start=start, length=3),)
        with pytest.raises(ValueError, match="too few pages"):
            compiled.step(torch.arange(3), replace(good, sequences=beyond), cache, [])


@torch.inference_mode()
def test_a_cache_of_another_model_is_refused() -> None:
    """Regression: rows written beyond a narrower layer's."""
    config = CONFIGS["layers all"]
    assert isinstance(config.attention, tuple) and isinstance(config.rope, tuple)
    compiled = NativeModel(random_model(config, torch.bfloat16))
    turned = replace(config, attention=config.attention[::-1], rope=config.rope[::-1])
    short = replace(config, num_hidden_layers=1, attention=config.attention[:1], rope=YARN)
    item = SequenceSlice(pages=(0,), start=0, length=3)
    batch = AttentionBatch.build([item], page_size=8)
    for other, said in ((turned, "rows of another width"), (short, "too few layers")):
        cache = PagedCache(other, num_pages=1, page_size=8, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=said):
            compiled.step(torch.arange(3), batch, cache, [])
    layers = [(torch.zeros(pages, 8, 6, dtype=torch.bfloat16), 6, 0, None, 0) for pages in (2, 3)]
    with pytest.raises(ValueError, match="differ in pages"):
        native.module().Cache.make(layers)
