"""What a layer's error costs at the end of the model: measured one layer at a time, and heeded."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowlat.config.model import ModelConfig
from lowlat.convert.compression import compress as compress_module
from lowlat.convert.compression.budget import EntryWidths, PredictedError, Sensitivity
from lowlat.convert.compression.compress import SENSITIVITY_ROUNDS
from lowlat.convert.compression.sensitivity import (
    EVERY,
    LEAST_LATENT,
    LENGTH,
    MAX_RATIO,
    WINDOWS,
    layer_sensitivities,
    sensitivity_windows,
    shrunk,
    single_layer_divergences,
)
from lowlat.model.block import DecoderLayer
from lowlat.model.transformer import Transformer
from lowlat.utils.progress import SilentProgress
from tests.fakes import tiny_model
from tests.packed_attention import PackedAttention

from .models import CASES, IDS, ModelWeights, compressed_model, model_config, weights_of, windows


def compressed_folder(weights: ModelWeights, folder: Path) -> Transformer:
    new, _ = compressed_model(weights, folder, "free")
    model = Transformer(new.config, dtype=torch.float32)
    model.load_state_dict({name: new.read(name).float() for name in model.state_dict()})
    return model


def layers_of(model: Transformer) -> list[DecoderLayer]:
    return [layer for layer in model.layers if isinstance(layer, DecoderLayer)]


@torch.no_grad()
def mixed_logits(model: Transformer, other: Transformer, changed: int, ids: Tensor) -> Tensor:
    """`model` over one window with the attention of layer `changed` taken from `other`."""
    backend = PackedAttention([len(ids)])
    x = model.embed_tokens(ids)
    for number, layer in enumerate(layers_of(model)):
        side = other if number == changed else model
        own = layers_of(side)[number].self_attn
        rope = side.rotary.of(number, side.rotary(backend.positions()))
        x = x + own(layer.input_layernorm(x), rope, backend)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.logits(model.norm(x))


@pytest.mark.slow
@pytest.mark.parametrize("config", CASES, ids=IDS)
def test_one_layer_at_a_time(config: ModelConfig, tmp_path: Path) -> None:
    """The figures are those of whole models in which one layer's attention was put in."""
    weights = weights_of(config)
    original = tiny_model(config, torch.float32)
    original.load_state_dict({n: weights.read(n).float() for n in original.state_dict()})
    compressed = compressed_folder(weights, tmp_path)

    def tensors(number: int) -> dict[str, Tensor]:
        return layers_of(compressed)[number].self_attn.state_dict()

    ids = windows(3)
    with SilentProgress().task("", 3, "items") as task:
        found = single_layer_divergences(weights, compressed.config, tensors, ids, task)
    expected = [0.0] * 3
    for window in ids:
        plain = F.log_softmax(mixed_logits(original, original, -1, window)[::EVERY], dim=-1)
        for number in range(3):
            mixed = mixed_logits(original, compressed, number, window)[::EVERY]
            difference = plain - F.log_softmax(mixed, dim=-1)
            expected[number] += float((plain.exp() * difference).sum())
    tokens = ids[:, ::EVERY].numel()
    assert found == pytest.approx([each / tokens for each in expected], rel=1e-3, abs=1e-7)
    assert min(found) > 1e-6


def priced(
    alone: list[float], still: list[float], costs: list[tuple[float, float]]
) -> list[Sensitivity]:
    """`costs`: still, then that of the latent's two channels kept."""
    layers = [
        PredictedError(
            nope=first, latent=torch.tensor([9.0, 9.0, second, 0.0], dtype=torch.float64)
        )
        for first, second in costs
    ]
    return layer_sensitivities(layers, [EntryWidths(latent=2, rotary=8)] * len(costs), alone, still)


def test_prices_are_nats_per_cost() -> None:
    found = priced([0.3, 0.5], [0.1, 0.4], [(0.1, 0.4), (0.2, 0.2)])
    assert [own.nope for own in found] == pytest.approx([1.0, 2.0])
    assert [own.latent for own in found] == pytest.approx([0.5, 0.5])
    layer = PredictedError(nope=0.1, latent=torch.tensor([3.0, 0.4], dtype=torch.float64))
    assert layer.total(1, found[0]) == pytest.approx(0.1 + 0.2)


def test_prices_that_cannot_be_measured() -> None:
    """Where nothing is lost the price is that of other layers; none is out of all proportion."""
    found = priced([0.3, 0.3, 0.3], [0.0, 0.2, 0.2], [(0.0, 0.1), (0.1, 0.1), (0.1, 0.1)])
    assert [own.nope for own in found] == pytest.approx([2.0, 2.0, 2.0])
    assert [own.latent for own in found] == pytest.approx([3.0, 1.0, 1.0])
    found = priced([0.2, 0.1], [0.3, 0.0], [(0.1, 0.1), (0.1, 0.1)])
    assert [own.latent for own in found] == pytest.approx([LEAST_LATENT * 2, 1.0])
    found = priced([0.0], [0.0], [(0.0, 0.0)])
    assert found == [Sensitivity(nope=1.0, latent=1.0)]
    still = [1e-9, 0.1, 0.1, 900.0]
    found = priced([each + 0.1 for each in still], still, [(0.1, 0.1)] * 4)
    assert [own.nope for own in found] == pytest.approx([1 / MAX_RATIO, 1.0, 1.0, MAX_RATIO])


def test_prices_are_trusted_by_a_quarter() -> None:
    found = shrunk(
        [
            Sensitivity(nope=1.0, latent=32.0),
            Sensitivity(nope=16.0, latent=2.0),
            Sensitivity(nope=256.0, latent=0.125),
        ]
    )
    assert [own.nope for own in found] == pytest.approx([8.0, 16.0, 32.0])
    assert [own.latent for own in found] == pytest.approx([4.0, 2.0, 1.0])


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64])
def test_prices_are_of_all_parts_of_the_text(count: int) -> None:
    given = torch.arange(count)[:, None].expand(count, 1024)
    found = sensitivity_windows(given)
    assert found.shape[1] == LENGTH
    assert min(count, WINDOWS) // 2 < len(found) <= WINDOWS
    places = found[:, 0]
    assert places[0] == 0
    assert places[-1] >= count - 1 - count // WINDOWS


def test_channels_go_where_errors_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer whose errors the head does not see gives channels to the others."""
    weights = weights_of(model_config())
    seen = torch.arange(61) < 30
    weights.read("layers.2.self_attn.o_proj.weight")[seen] = 0
    weights.read("layers.2.mlp.down_proj.weight")[:] = 0
    weights.read("lm_head.weight")[:, ~seen] = 0
    rows: dict[int, list[int]] = {}
    for pricings in (0, SENSITIVITY_ROUNDS):
        monkeypatch.setattr(compress_module, "SENSITIVITY_ROUNDS", pricings)
        folder = tmp_path / str(pricings)
        folder.mkdir()
        config = compressed_folder(weights, folder).config
        rows[pricings] = [config.attention_of(number).entry_dim for number in range(3)]
    assert rows[SENSITIVITY_ROUNDS][2] < rows[0][2]
    assert sum(rows[SENSITIVITY_ROUNDS][:2]) > sum(rows[0][:2])
