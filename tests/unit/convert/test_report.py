"""The report of a compression: its object and its picture."""

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from typing import Any

import pytest

from lowlat.convert import report_plot
from lowlat.convert.compression.compress import CompressionReport, LayerReport
from lowlat.convert.report import compression_object, report_files
from tests.configs import MLA
from tests.fakes import gqa_config

COST = CompressionReport(
    method="weighted",
    layout="free",
    calibration="text.txt",
    channels_before=60,
    channels_after=30.0,
    perplexity_before=20.0,
    perplexity_after=25.0,
    layers=(
        LayerReport(
            latent=24,
            rotary=8,
            predicted_error=0.01,
            predicted_divergence=0.003,
            measured_deviation=0.02,
        ),
        LayerReport(
            latent=10,
            rotary=18,
            predicted_error=0.04,
            predicted_divergence=0.02,
            measured_deviation=0.09,
        ),
    ),
)
EVALUATIONS = [{"tokens": 0, "divergence": 0.4}, {"tokens": 4096, "divergence": 0.2}]


def told() -> dict[str, Any]:
    config = gqa_config()
    attention = replace(
        MLA,
        num_attention_heads=6,
        kv_lora_rank=24,
        q_lora_rank=None,
        qk_nope_head_dim=10,
        v_head_dim=10,
        kv_a_layernorm=False,
    )
    return compression_object(
        COST, config, gqa_config(model_type="deepseek_v3", attention=attention)
    )


def test_what_the_object_holds() -> None:
    found = told()
    assert found["attention_before"] == "GQA, 6 heads in 3 groups of 10"
    assert found["attention_after"] == "MLA, 6 heads, latent 24 + rotary key 6"
    assert found["cache_bytes_per_token_before"] == 2 * 2 * 60
    assert found["cache_bytes_per_token_after"] == 2 * 2 * 30
    assert found["cache_bytes_per_token_int8"] == 2 * (32 + 4)
    assert [layer["rotary_share"] for layer in found["layers"]] == [0.25, 18 / 28]
    assert json.loads(report_files(found)["conversion.json"]) == json.loads(json.dumps(found))


@pytest.mark.parametrize("recovered", [False, True])
def test_the_picture(recovered: bool) -> None:
    """Well-formed, the same bytes again, with a panel more where it was recovered."""
    report = told() | ({"recovery": {"evaluations": EVALUATIONS}} if recovered else {})
    picture = report_files(report)["conversion.svg"]
    assert picture == report_plot.draw(report)
    root = ElementTree.fromstring(picture)
    groups = {group.get("id", "") for group in root.iter("{http://www.w3.org/2000/svg}g")}
    assert {"axes_1", "axes_2"} <= groups and ("axes_3" in groups) == recovered
    assert b"<dc:date>" not in picture


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_plot, "available", lambda: False)
    assert set(report_files(told())) == {"conversion.json"}
