"""What is measured of a layer's attention."""

from pathlib import Path

import torch
from torch import Tensor

from lowlat.convert.compression.calibration import Calibration
from lowlat.convert.compression.statistics import run_layers
from lowlat.utils.progress import SilentProgress

from .models import ModelWeights, model_config, weights_of, windows
from .test_compress import compressed_model

SINK = 7
"""A token that is huge in the residual stream, as an end of text is in many models."""


def with_sink(size: float) -> ModelWeights:
    weights = weights_of(model_config())
    weights.read("embed_tokens.weight")[SINK] *= size
    return weights


def text_with_sinks() -> Tensor:
    """Windows of which every second holds one, far behind its beginning."""
    text = windows(12)
    text[text == SINK] += 1
    text[::2, 25] = SINK
    return text


def test_attention_sinks_are_no_measure() -> None:
    """Regression: five ends of text in 32 windows made layers look three times as large, and their
    errors a third as bad.
    """
    residuals: list[list[float]] = []
    for size in (1.0, 3000.0):
        with SilentProgress().task("", 3, "items") as task:
            measured = run_layers(with_sink(size), text_with_sinks(), torch.float32, task)
            residuals.append([statistics.residual for statistics in measured])
    plain, huge = (torch.tensor(found) for found in residuals)
    torch.testing.assert_close(huge, plain, rtol=0.1, atol=0)


def test_deviation_is_token_by_token(tmp_path: Path) -> None:
    """Regression: behind the layer in which sinks appear nothing seemed to deviate."""
    deviations: list[list[float]] = []
    text = text_with_sinks()
    calibration = Calibration(windows=text[:8], held_out=text[8:], origin="test")
    for size in (1.0, 3000.0):
        weights, folder = with_sink(size), tmp_path / str(size)
        folder.mkdir()
        _, report = compressed_model(weights, folder, "standard", calibration=calibration)
        deviations.append([layer.measured_deviation for layer in report.layers])
    plain, huge = (torch.tensor(found) for found in deviations)
    torch.testing.assert_close(huge, plain, rtol=0.5, atol=0)
