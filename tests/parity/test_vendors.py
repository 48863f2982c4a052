"""Folders of compressed-tensors against transformers, which dequantizes them itself."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from lowlat.checkpoint.load import load_model
from lowlat.config.model import ModelConfig
from tests.packed_attention import PackedAttention
from tests.unit.checkpoint.test_vendors import grouped_config, latent_config
from tests.unit.checkpoint.vendor_files import FORMATS, quantize_folder

CONFIGS = {"llama": grouped_config(), "deepseek_v3": latent_config()}
TOKENS = 23


@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("llama", "int4"),
        ("llama", "int4-asymmetric"),
        ("llama", "fp8-channel"),
        ("deepseek_v3", "int4"),  # transformers cannot dequantize experts with zero points
        ("deepseek_v3", "fp8-channel"),
    ],
)
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@torch.no_grad()
def test_logits_are_those_of_transformers(tmp_path: Path, family: str, own: str) -> None:
    """transformers rounds dequantized weights to bf16, the dtype of their scales."""
    config: ModelConfig = CONFIGS[family]
    quantize_folder(tmp_path / "m", config, FORMATS[own])
    loading = CompressedTensorsConfig(dequantize=True)
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    oracle = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", dtype=torch.float32, quantization_config=loading, **options
    )
    oracle = oracle.float().eval()
    ids, positions = torch.arange(TOKENS) * 7 % config.vocab_size, torch.arange(TOKENS)
    reference = oracle(ids[None], use_cache=False).logits[0].float()
    model = load_model(tmp_path / "m", dtype="fp32").model
    mine = model.logits(model(ids, positions, PackedAttention([TOKENS])))
    assert (mine - reference).norm() < 0.01 * reference.norm()
