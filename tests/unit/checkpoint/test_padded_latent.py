"""The latents of exactly converted models in files: hand-made numbers, and the norm as identity."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lowlat.checkpoint.mapping_operations import PadLatent
from lowlat.checkpoint.padded_latent import (
    pad_bias,
    pad_columns,
    pad_latent,
    pad_rows,
    unpad_latent,
)
from lowlat.config.model import MLAConfig
from lowlat.ops.norm import rms_norm
from lowlat.utils.errors import UserError

from .builders import FAMILIES, write_model

HIDDEN, RANK, ROPE, HEADS, VALUE = 70, 3, 4, 2, 5


def attention(*, biased: bool, o_bias: bool = False) -> MLAConfig:
    return MLAConfig(
        num_attention_heads=HEADS,
        kv_lora_rank=RANK,
        q_lora_rank=None,
        qk_nope_head_dim=0,
        qk_rope_head_dim=ROPE,
        v_head_dim=VALUE,
        attention_bias=biased,
        q_bias=biased,
        o_bias=o_bias,
        kv_a_layernorm=False,
    )


def layer(config: MLAConfig, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "q_proj.weight": (HEADS * ROPE, HIDDEN),
        "kv_a_proj_with_mqa.weight": (RANK + ROPE, HIDDEN),
        "kv_b_proj.weight": (HEADS * VALUE, RANK),
        "o_proj.weight": (HIDDEN, HEADS * VALUE),
    }
    if config.attention_bias:
        shapes |= {"q_proj.bias": (HEADS * ROPE,), "kv_a_proj_with_mqa.bias": (RANK + ROPE,)}
    if config.attention_bias or config.o_bias:
        shapes["o_proj.bias"] = (HIDDEN,)
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def test_numbers() -> None:
    """Rank 64 needs 128 channels, 2 of them constant: 64 real, 62 zero, 2 times 32768."""
    bias = pad_bias(torch.arange(64.0 + 3) + 1, 64)
    assert bias.tolist() == [*range(1, 65)] + [0] * 62 + [32768.0] * 2 + [65, 66, 67]
    rows = pad_rows(torch.ones(63 + 3, 2), 63)
    assert rows.sum(1).tolist() == [2] * 63 + [0] + [2] * 3
    columns = pad_columns(torch.ones(2, 3), 3)
    assert columns.tolist() == [[1, 1, 1] + [0] * 61] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, 62, 63, 64, 127, 384])
def test_norm_is_the_identity(rank: int, dtype: torch.dtype) -> None:
    """RMSNorm over the padded latent gives the real channels back, up to (|c| / m)^2."""
    latent = (torch.randn(7, rank) * 20).to(dtype)
    bias = pad_bias(torch.zeros(rank + 2, dtype=dtype), rank)[:-2]
    padded = torch.cat([latent, latent.new_zeros(7, len(bias) - rank)], dim=1) + bias
    result = rms_norm(padded, torch.full_like(bias, 4096.0), 1e-6)[:, :rank]
    rtol = 2e-5 if dtype == torch.float32 else 0
    torch.testing.assert_close(result, latent, rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("o_bias", [False, True])
def test_reverse(biased: bool, o_bias: bool, dtype: torch.dtype) -> None:
    config = attention(biased=biased, o_bias=o_bias)
    tensors = layer(config, dtype)
    padded = pad_latent(tensors, config)
    assert all(tensor.dtype == dtype for tensor in padded.values())
    back = unpad_latent(padded.__getitem__, config)
    assert set(back) == set(tensors)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_queries_with_bias() -> None:
    """q_b(norm(q_a x)) = W_q x + b_q: the norm passes x on and appends ones."""
    config = attention(biased=True)
    tensors = layer(config)
    files = pad_latent(tensors, config)
    x = torch.randn(11, HIDDEN)
    down = x @ files["q_a_proj.weight"].T + files["q_a_proj.bias"]
    normed = rms_norm(down, files["q_a_layernorm.weight"], 1e-6)
    result = normed @ files["q_b_proj.weight"].T
    expected = x @ tensors["q_proj.weight"].T + tensors["q_proj.bias"]
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert files["q_a_proj.weight"].shape == (128, HIDDEN)


def test_missing_output_bias_is_zero() -> None:
    """The files' layout has the bias wherever the others are."""
    config = attention(biased=False)
    files = pad_latent(layer(config), config)
    assert files["o_proj.bias"].tolist() == [0.0] * HIDDEN
    assert "q_a_proj.weight" not in files and "q_proj.weight" in files


DAMAGE: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "kv_a_proj_with_mqa.weight": lambda t: t["kv_a_proj_with_mqa.weight"][RANK, 1].fill_(1),
    "kv_a_proj_with_mqa.bias": lambda t: t["kv_a_proj_with_mqa.bias"][63].fill_(1),
    "kv_a_layernorm.weight": lambda t: t["kv_a_layernorm.weight"][0].fill_(1),
    "kv_b_proj.weight": lambda t: t["kv_b_proj.weight"][0, 63].fill_(1),
    "q_a_proj.weight": lambda t: t["q_a_proj.weight"][0, 0].fill_(2),
    "q_a_proj.bias": lambda t: t["q_a_proj.bias"][0].fill_(2),
    "q_a_layernorm.weight": lambda t: t["q_a_layernorm.weight"][127].fill_(4096),
    "q_b_proj.weight": lambda t: t["q_b_proj.weight"][0, 127].fill_(1),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage(name: str) -> None:
    """A file whose constants were changed (fine-tuned, quantised) is no exact conversion."""
    config = attention(biased=True)
    tensors = pad_latent(layer(config), config)
    DAMAGE[name](tensors)
    with pytest.raises(UserError, match=f"tensor 'x.{name}': it"):
        unpad_latent(tensors.__getitem__, config, "x.")


@pytest.mark.parametrize("config", [attention(biased=False), attention(biased=True)])
def test_shapes_in_files(config: MLAConfig) -> None:
    """Shapes are checked before a tensor is read; they are those that saving writes."""
    tensors = {f"l.{name}": tensor for name, tensor in layer(config).items()}
    operation = PadLatent("file.l.", "l.", config)
    expected = operation.file_shapes({name: tuple(t.shape) for name, t in tensors.items()})
    assert expected == {name: tuple(t.shape) for name, t in operation.save(tensors.__getitem__)}


def test_loading_imports_no_compiler(tmp_path: Path) -> None:
    """torch._dynamo takes a second to import, and triton with it."""
    write_model(tmp_path / "m", FAMILIES["llama-converted"])
    program = (
        "import sys; from lowlat.checkpoint.load import load_model; from pathlib import Path; "
        f"load_model(Path({str(tmp_path / 'm')!r})); assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
