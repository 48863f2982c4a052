"""What holds for every attention of the family: cached equals whole, gradients reach all, sizes."""

from dataclasses import replace

import pytest
import torch

from lowlat.attention.flash import FlashAttention
from lowlat.config.kv_cache_size import kv_cache_size
from lowlat.config.model import ModelConfig, QuantConfig
from lowlat.config.parameter_count import count_parameters
from lowlat.config.weight_memory import weight_bytes
from lowlat.engine import scoring
from lowlat.engine.runner import ModelRunner
from lowlat.model.init import init_weights
from lowlat.model.quant import store_packed
from lowlat.model.transformer import Transformer
from tests.lowlat_configs import EVERY, FORMS, LAYERS, random_model
from tests.packed_attention import PackedAttention

every_config = pytest.mark.parametrize("config", EVERY.values(), ids=EVERY)
IDS = torch.randint(0, 263, (61,), generator=torch.Generator().manual_seed(5))


def packed_logits(model: Transformer, lengths: list[int]) -> torch.Tensor:
    packed = PackedAttention(lengths)
    return model.logits(model(IDS, packed.positions(), packed))


@pytest.mark.slow
@every_config
@pytest.mark.parametrize("chunk", [1, 7, 61])
def test_cached_equals_whole(config: ModelConfig, chunk: int) -> None:
    """One token at a time, few (streams), and all at once (keys and values are built)."""
    model = random_model(config, torch.float64)
    logits = scoring.logits(ModelRunner(model, page_size=8), IDS.tolist(), chunk=chunk)
    expected = packed_logits(model, [61])
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


@every_config
def test_sequences_in_one_batch_do_not_mix(config: ModelConfig) -> None:
    model = random_model(config, torch.float64)
    together = packed_logits(model, [19, 42])
    for part, ids in zip(together.split([19, 42]), IDS.split([19, 42]), strict=True):
        own = PackedAttention([len(ids)])
        alone = model.logits(model(ids, own.positions(), own))
        torch.testing.assert_close(part, alone, rtol=0, atol=1e-12)


@every_config
def test_flash_equals_packed(config: ModelConfig) -> None:
    model = random_model(config, torch.float64)
    flash = FlashAttention([19, 42])
    logits = model.logits(model(IDS, flash.positions(), flash))
    torch.testing.assert_close(logits, packed_logits(model, [19, 42]), rtol=0, atol=1e-10)


@every_config
def test_int8_cache_is_near(config: ModelConfig) -> None:
    """Rows in int8 with a scale per 64 channels cost a few percent at most, in every form."""
    model = random_model(config, torch.float64)
    runner = ModelRunner(model, page_size=8, cache_dtype=torch.int8)
    logits, exact = scoring.logits(runner, IDS.tolist(), chunk=7), packed_logits(model, [61])
    distance = (logits - exact).norm(dim=1) / exact.norm(dim=1)
    assert 1e-6 < distance.median() < 0.05


@every_config
def test_gradients_reach_every_parameter(config: ModelConfig) -> None:
    model = Transformer(config, dtype=torch.float64)
    init_weights(model, seed=7)
    packed = PackedAttention([19, 42])
    hidden = model(IDS, packed.positions(), packed)
    loss = model.logits(hidden).logsumexp(dim=-1).sum()
    for depth in range(config.num_nextn_predict_layers):
        hidden = model.mtp_hidden(depth, hidden, IDS, packed.positions(), packed)
        loss = loss + model.mtp_logits(depth, hidden).logsumexp(dim=-1).sum()
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@every_config
def test_counts_and_bytes_are_those_of_the_modules(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Transformer(config, dtype=torch.bfloat16)
    tensors = list(model.state_dict().values())
    count = count_parameters(config)
    assert sum(tensor.numel() for tensor in tensors) == count.total + count.mtp
    assert sum(tensor.nbytes for tensor in tensors) == weight_bytes(config, "bf16")
    rows = [config.attention_of(layer).entry_dim for layer in range(config.num_hidden_layers)]
    assert kv_cache_size(config).elements_per_token_layer == sum(rows) / len(rows)


@every_config
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_packed_bytes_are_those_of_the_modules(config: ModelConfig, dtype: str) -> None:
    with torch.device("meta"):
        model = Transformer(config, dtype=torch.bfloat16)
        model.add_head()
    store_packed(model, dtype)
    total = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert total == weight_bytes(config, dtype)


@pytest.mark.parametrize("config", [*FORMS.values(), *LAYERS.values()], ids=[*FORMS, *LAYERS])
def test_fp8_bytes_are_those_of_the_modules(config: ModelConfig) -> None:
    config = replace(config, quantization=QuantConfig(weight_block_size=(8, 4)))
    with torch.device("meta"):
        model = Transformer(config, dtype=torch.bfloat16)
    total = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert total == weight_bytes(config)
