"""Importance of projections: mean squares of their inputs in a run of the whole model."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowlat.checkpoint.hf_folder import open_checkpoint
from lowlat.checkpoint.load import load_model, read_config
from lowlat.convert.parameters.weights import SourceWeights, parameter_shapes
from lowlat.convert.quantization import activations
from lowlat.convert.quantization.activations import (
    WINDOWS,
    ActivationStatistics,
    activation_windows,
)
from lowlat.model.linear import Linear
from lowlat.model.mla import MLA
from lowlat.model.transformer import Transformer
from lowlat.ops.calibrated_quantization import ActivationCovariance
from tests.packed_attention import PackedAttention
from tests.unit.checkpoint.builders import FAMILIES, write_model

COUNT, LENGTH = 3, 12


def windows_of(vocab_size: int) -> Tensor:
    return torch.randint(vocab_size, (COUNT, LENGTH), generator=torch.Generator().manual_seed(1))


def measured(folder: Path) -> dict[str, Tensor]:
    """Of all projections, covariances or squares; those of MTP modules are all 1."""
    source = open_checkpoint(folder)
    config = read_config(source)
    weights = SourceWeights(source, config, stored=config)
    windows = windows_of(config.vocab_size)
    statistics = ActivationStatistics(weights, windows, dtype=torch.float32)
    found: dict[str, Tensor] = {}
    for name, shape in parameter_shapes(config).items():
        is_quantized = name.endswith(("_proj.weight", "wq_b.weight", "wk.weight", "lm_head.weight"))
        if is_quantized and not name.endswith("weights_proj.weight"):
            own = statistics.of(name, shape[1])
            found[name] = own.matrix if isinstance(own, ActivationCovariance) else own
    return found


def expected(model: Transformer) -> dict[str, Tensor]:
    """Covariances by hooks on all projections, in a run of all windows at once."""
    found: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        found[name] = x.T @ x / len(x)

    for path, module in model.named_modules():
        if isinstance(module, Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=f"{path}.weight": keep(name, args[0])
            )
        if isinstance(module, MLA):
            rank, has_norm = module.dims.kv_lora_rank, module.dims.kv_a_layernorm
            latent = module.kv_a_layernorm if has_norm else module.kv_a_proj_with_mqa
            latent.register_forward_hook(
                lambda _, args, out, name=f"{path}.kv_b_proj.weight", rank=rank: keep(
                    name, out[:, :rank]
                )
            )
    backend = PackedAttention([LENGTH] * COUNT)
    with torch.no_grad():
        ids = windows_of(model.config.vocab_size).flatten()
        hidden = model(ids, backend.positions(), backend)
        keep("lm_head.weight", hidden)
    return found


@pytest.mark.parametrize(
    "family",
    [
        *("mistral", "qwen2", "deepseek_v3-mtp", "axk1", "minicpm3", "qwen2-converted"),
        "glm_moe_dsa-sharing",
    ],
)
@pytest.mark.parametrize("is_small", [False, True])
def test_statistics_are_those_of_the_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, is_small: bool
) -> None:
    """is_small: with mean squares only, as of wide inputs."""
    if is_small:
        monkeypatch.setattr(activations, "MAX_COVARIANCE", 0)
    write_model(tmp_path / "m", FAMILIES[family])
    found = measured(tmp_path / "m")
    wanted = expected(load_model(tmp_path / "m", dtype="fp32").model)
    if is_small:
        wanted = {name: covariance.diagonal() for name, covariance in wanted.items()}
    for name, own in found.items():
        if name not in wanted:
            assert name.startswith("mtp.") or (".experts." in name and (own == 1).all())
            continue
        atol = 1e-4 * float(wanted[name].abs().max())
        torch.testing.assert_close(own, wanted[name], rtol=1e-3, atol=atol)
    assert len(found) > 0 and any(".down_proj" in name for name in found.keys() & wanted.keys())


def test_threads_do_not_matter(tmp_path: Path) -> None:
    write_model(tmp_path / "m", FAMILIES["deepseek_v3"])
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(measured(tmp_path / "m"))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_windows_are_spread() -> None:
    windows = torch.arange(64)[:, None]
    assert activation_windows(windows).flatten().tolist() == list(range(0, 64, 64 // WINDOWS))
    assert len(activation_windows(windows[:9])) == 9
