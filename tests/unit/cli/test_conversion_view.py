"""What is printed of a conversion: the table of layers, healing, perplexities."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lowlat.cli.conversion_view import print_conversion

from .reports import conversion

WIDTHS = [
    {"latent": 96, "rotary": 32, "rotary_share": 0.25},
    {"latent": 160, "rotary": 96, "rotary_share": 0.375},
]
ERRORS = [
    {"predicted_error": 0.0001, "predicted_divergence": 0.00125, "measured_deviation": 0.0004},
    {"predicted_error": 0.0225, "predicted_divergence": 0.02, "measured_deviation": 0.01},
]
LAYERS = [widths | errors for widths, errors in zip(WIDTHS, ERRORS, strict=True)]
TOLD = {
    "method": "weighted",
    "fold": 1,
    "layout": "free",
    "calibration": "lowlat's own text",
    "channels_before": 384,
    "channels_after": 192.0,
    "perplexity_before": 20.0,
    "perplexity_after": 25.0,
    "layers": LAYERS,
}
HEALING = {
    "tokens": 500_000,
    "text_tokens": 200_000,
    "seconds": 100.0,
    "tokens_per_second": 5000.0,
    "divergence_before": 0.25,
    "divergence_after": 0.125,
    "loss_before": 3.5,
    "loss_after": 3.25,
}
SCORES = {
    "text": "wiki.txt",
    "original": {"perplexity": 16.0},
    "compressed": {"perplexity": 24.0},
    "recovered": {"perplexity": 18.0},
}


def printed(folder: Path, told: dict[str, Any]) -> str:
    (folder / "conversion.json").write_text(json.dumps(told))
    report = conversion(folder, folder)
    console = Console(width=200, record=True, file=io.StringIO())
    print_conversion(report, console)
    return console.export_text()


def test_all_of_it(tmp_path: Path) -> None:
    text = printed(tmp_path, TOLD | {"recovery": HEALING, "evaluation": SCORES})
    rows = [line.split() for line in text.splitlines()[1:3]]
    assert rows == [
        ["0", "96", "32", "(25%)", "0.0013", "1.0%", "2.0%"],
        ["1", "160", "96", "(38%)", "0.0200", "15.0%", "10.0%"],
    ]
    for words in (
        "384  ->  192 per token and layer (50% kept): latent 128 + rotary key 64",
        "1: the residual stream after it deviates by 10.0%",
        "perplexity 20.00  ->  25.00 (1.250x)",
        "500K tokens from a text of 200K, 2.5 epochs, in 1:40 (5,000 tokens/s)",
        "divergence from the original 0.2500  ->  0.1250 nats per token, loss 3.5000  ->  3.2500",
        "16.00  ->  compressed 24.00 (1.500x)  ->  recovered 18.00 (1.125x) on wiki.txt",
        "the plot needs lowlat[train]",
    ):
        assert words in text


def test_recipes_that_do_not_weigh_layers(tmp_path: Path) -> None:
    layers = [layer | {"predicted_divergence": None} for layer in LAYERS]
    text = printed(tmp_path, TOLD | {"layers": layers})
    assert "alone" not in text
    assert text.splitlines()[1].split() == ["0", "96", "32", "(25%)", "1.0%", "2.0%"]


def test_a_healing_that_harmed_says_so(tmp_path: Path) -> None:
    words = "it made the model worse, give more tokens"
    assert words not in printed(tmp_path, TOLD | {"recovery": HEALING})
    assert words in printed(tmp_path, TOLD | {"recovery": HEALING | {"divergence_after": 0.3}})


@pytest.mark.parametrize("layers", [LAYERS, LAYERS[:1]])
def test_without_healing(tmp_path: Path, layers: list[dict[str, Any]]) -> None:
    """Widths stand in the table only where layers differ."""
    (tmp_path / "conversion.svg").touch()
    text = printed(tmp_path, TOLD | {"layers": layers})
    assert ("rotary key" in text.splitlines()[0]) == (len(layers) == 2)
    assert "tokens from a text" not in text and "conversion.json and conversion.svg" in text


def test_folded_frequencies_stand_next_to_the_recipe(tmp_path: Path) -> None:
    assert "folded by" not in printed(tmp_path, TOLD)
    told = TOLD | {"method": "transmla", "fold": 2}
    text = " ".join(printed(tmp_path, told).split())
    assert "transmla, frequencies folded by 2, layout free" in text
