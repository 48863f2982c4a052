"""W_O fitted again: the best linear map under its ridge, unchanged where nothing was, and a gain on
the text it is fitted on.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowlat.attention.flash import FlashAttention
from lowlat.config.model import ModelConfig
from lowlat.convert.compression.calibration import Calibration
from lowlat.convert.compression.layer_runner import LayerRunner, layer_weights
from lowlat.convert.compression.methods import METHODS
from lowlat.convert.compression.paired_run import RIDGE, OutputRegression
from lowlat.model.block import DecoderLayer
from lowlat.ops.rope import RotaryEmbedding

from .models import CASES, IDS, LENGTH, compressed_model, model_config, weights_of, windows


def random_case(bias: bool) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """W_O [7, 5], its bias, and given, before and wanted for 40 tokens, fp32."""
    generator = torch.Generator().manual_seed(2)
    shapes = (7, 5), (7,), (40, 5), (40, 7), (40, 7)
    weight, offset, given, before, wanted = (torch.randn(s, generator=generator) for s in shapes)
    return weight, offset if bias else None, [given, before, wanted]


@pytest.mark.parametrize("bias", [False, True])
def test_no_other_projection_is_better(bias: bool) -> None:
    """The gradient of what it minimises is zero, in however many windows the tokens come."""
    weight, offset, (given, before, wanted) = random_case(bias)
    refit = OutputRegression(weight, offset)
    for part in zip(*(x.split(13) for x in (given, before, wanted)), strict=True):
        refit.add(*part)
    found = refit.solution().requires_grad_()
    given, before, wanted = (x.double() for x in (given, before, wanted))
    made = before + given @ found.T + (0 if offset is None else offset.double())
    counts = wanted.square().sum(1).reciprocal()
    errors = ((made - wanted).square().sum(1) * counts).sum()
    mean = (given.square() * counts[:, None]).sum(0).mean()
    cost = errors + RIDGE * mean * (found - weight.double()).square().sum()
    (gradient,) = torch.autograd.grad(cost, found)
    assert float(gradient.abs().max()) < 1e-5 * cost.item()
    assert not torch.allclose(found.detach(), weight.double(), atol=0.1)


def test_what_is_right_stays() -> None:
    weight, offset, (given, before, _) = random_case(True)
    assert offset is not None
    refit = OutputRegression(weight, offset)
    refit.add(given, before, before + given @ weight.T + offset)
    torch.testing.assert_close(refit.solution(), weight.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", CASES, ids=IDS)
def test_a_layer_runs_as_the_model_has_it(config: ModelConfig) -> None:
    weights = weights_of(config)
    layer = DecoderLayer(config, 1, dtype=torch.float32)
    state = layer_weights(weights, 1)
    layer.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    x = torch.randn(LENGTH, config.hidden_size)
    rope = RotaryEmbedding(config.rope_of(1), config.attention_of(1).rope_dim)(torch.arange(LENGTH))
    with torch.no_grad():
        expected = layer(x, rope, FlashAttention([LENGTH]))
        run = LayerRunner(config, 1, state, LENGTH, torch.float32)
        middle = x + run.attend(run.normed(x))
        torch.testing.assert_close(run.finish(middle), expected)
        heads = LayerRunner(config, 1, state, LENGTH, torch.float32, has_output=False)
        joined = layer.self_attn.o_proj(heads.attend(heads.normed(x)))
        torch.testing.assert_close(x + joined, middle)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["standard", "free"])
@pytest.mark.parametrize("bias", [False, True])
def test_it_brings_a_model_nearer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bias: bool, layout: str
) -> None:
    """Measured on the text that was fitted on: behind each layer less deviation than without."""
    weights, text = weights_of(model_config(bias=bias)), windows(24)
    found: dict[bool, list[float]] = {}
    for refits in (False, True):
        way = replace(METHODS["weighted"], fits_output=refits)
        monkeypatch.setitem(METHODS, "weighted", way)
        (tmp_path / str(refits)).mkdir()
        calibration = Calibration(windows=text, held_out=text, origin="test")
        new, report = compressed_model(
            weights, tmp_path / str(refits), layout, calibration=calibration
        )
        found[refits] = [layer.measured_deviation for layer in report.layers]
        name = "layers.1.self_attn.o_proj.weight"
        kept = torch.equal(new.read(name).double(), weights.read(name).double())
        assert kept == (not refits)
    assert all(after < before for before, after in zip(found[False], found[True], strict=True))


def test_products_in_bf16_measure_much_the_same(tmp_path: Path) -> None:
    weights = weights_of(model_config())
    found: list[list[float]] = []
    for precision in (torch.float32, torch.bfloat16):
        (tmp_path / str(precision)).mkdir()
        folder = tmp_path / str(precision)
        _, report = compressed_model(weights, folder, "standard", precision=precision)
        found.append([layer.measured_deviation for layer in report.layers])
    assert found[1] == pytest.approx(found[0], rel=0.02)
