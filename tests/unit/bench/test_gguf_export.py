"""GGUF files of random checkpoints, read back with lowlat's own reader: bit for bit."""

from dataclasses import replace
from pathlib import Path

import fakes
import pytest
import torch

from lowlat.bench.gguf_export import export, metadata
from lowlat.checkpoint.load import load_model
from lowlat.config.model import MLAConfig, RopeConfig
from lowlat.utils.errors import UserError

from .benchmarks import random_checkpoint

GENERATOR = random_checkpoint()


@pytest.fixture(scope="module", params=["yarn, groups, query latent", "softmax, no query latent"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    if request.param.startswith("softmax"):
        small = dict(GENERATOR.PRESETS["tiny"])
        lite = GENERATOR.PRESETS["lite"]
        keys = ("model_type", "scoring_func", "topk_method", "norm_topk_prob", "q_lora_rank")
        small |= {key: lite[key] for key in (*keys, "routed_scaling_factor")}
        small |= {"n_group": 1, "topk_group": 1}
        GENERATOR.PRESETS["v2"] = small
        GENERATOR.write("v2", folder, seed=1)
    else:
        GENERATOR.write("tiny", folder, seed=0)
    return folder


@pytest.mark.parametrize("kind", ["F32", "BF16"])
def test_a_round_trip_loses_nothing(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    export(checkpoint, tmp_path / "model.gguf", kind)
    before, after = (
        load_model(path, dtype="fp32") for path in (checkpoint, tmp_path / "model.gguf")
    )
    expected, found = before.model.state_dict(), after.model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert after.config.moe == before.config.moe
    assert after.config.attention == before.config.attention
    assert after.config.softmax_scale == pytest.approx(before.config.softmax_scale, rel=1e-6)


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        export(tmp_path / "absent", tmp_path / "model.gguf", "F32")
    assert list(tmp_path.iterdir()) == []


def test_rotary_settings_without_a_form_are_refused() -> None:
    config = fakes.mla_config()
    rope = RopeConfig(rope_theta=1e4, rope_type="yarn", factor=4.0, mscale=1.0, mscale_all_dim=0.7)
    assert isinstance(config.attention, MLAConfig)
    with pytest.raises(UserError, match=r"leave llama\.cpp out"):
        metadata(replace(config, rope=rope), config.attention)
