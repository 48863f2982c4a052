"""What a compression decides: which components turn, how wide heads are."""

from pathlib import Path

import pytest
import torch

from lowlat.config.model import GQAConfig, MLAConfig
from lowlat.convert.compression.budget import EntryWidths
from lowlat.convert.compression.plan import CacheLayout, compressed_config
from lowlat.convert.compression.statistics import read_attention, run_layers
from lowlat.ops.rope import inverse_frequencies
from lowlat.utils.progress import SilentProgress

from .models import compressed_model, model_config, weights_of, windows


def test_mha2mla_picks_layer_by_layer(tmp_path: Path) -> None:
    """In every group the pairs of largest |q| |k| of that very layer turn, as many in each, and all
    layers are as wide as each other.
    """
    weights = weights_of(model_config())
    new, report = compressed_model(weights, tmp_path, "free", "mha2mla")
    assert len({(layer.latent, layer.rotary) for layer in report.layers}) == 1
    with SilentProgress().task("", 3, "items") as task:
        measured = list(run_layers(weights, windows(8), torch.float32, task))
    turning: set[tuple[float, ...]] = set()
    for number, statistics in enumerate(measured):
        rotary = report.layers[number].rotary
        norms = statistics.norms.unflatten(0, (3, -1)).sum(1)
        picked = norms.topk(rotary // 6, dim=1).indices
        expected = read_attention(weights, number).frequencies[picked].flatten().sort().values
        found = inverse_frequencies(new.config.rope_of(number), rotary).double().sort().values
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        turning.add(tuple(found.tolist()))
    assert len(turning) > 1


@pytest.mark.parametrize(
    ("head_dim", "rotary", "layout", "padding"),
    [
        (64, 56, "standard", 8),
        (64, 96, "standard", 0),
        (64, 56, "free", 0),
        (128, 128, "standard", 0),
        (128, 136, "standard", 0),
    ],
)
def test_key_heads_are_as_wide_as_other_programs_take(
    head_dim: int, rotary: int, layout: CacheLayout, padding: int
) -> None:
    """Multiples of 32 channels where they are 256 at most, in the layout that others load."""
    source = GQAConfig(num_attention_heads=2, num_key_value_heads=2, head_dim=head_dim)
    widths, frequencies = [EntryWidths(latent=8, rotary=rotary)], torch.ones(rotary // 2).double()
    weights = weights_of(model_config())
    config = compressed_config(weights.config, source, widths * 3, [frequencies] * 3, layout)
    attention = config.attention
    assert isinstance(attention, MLAConfig)
    assert attention.qk_nope_head_dim == head_dim + padding
