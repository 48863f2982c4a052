"""GGUF files written by lowlat, in llama.cpp: the logits of the source in fp32, and its text.

Opt-in: LOWLAT_LLAMA_PYTHON names an interpreter that has llama-cpp-python.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowlat.api import load, prepare
from lowlat.bench.agreement import logits_of
from lowlat.checkpoint.load import load_model
from lowlat.checkpoint.save import save_model
from lowlat.config.model import (
    GQAConfig,
    IndexerConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
)
from lowlat.convert.run import convert
from lowlat.model.transformer import Transformer
from lowlat.peers.worker import Worker
from lowlat.text.gguf_keys import PROBES
from lowlat.text.tokenizer import Tokenizer
from tests import configs
from tests.configs import GQA, INTERLEAVED, LLAMA3, MLA, MOE, ROPE
from tests.packed_attention import PackedAttention

PYTHON = os.environ.get("LOWLAT_LLAMA_PYTHON", "")
TOLERANCE = 3e-5
"""Of the largest logit."""
TOKENS = [(7 * place + 3) % 97 for place in range(37)]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON, reason="LOWLAT_LLAMA_PYTHON names no interpreter with llama-cpp-python"
    ),
]

V3 = replace(MOE, moe_intermediate_size=32, n_group=4, topk_group=2)
GLM = replace(V3, n_group=1, topk_group=1)
V2 = replace(
    V3,
    scoring_func="softmax",
    topk_method="greedy",
    n_group=1,
    topk_group=1,
    norm_topk_prob=False,
    scale_after_norm=False,
)
YARN = replace(configs.YARN, original_max_position_embeddings=64)
RELEASED_YARN = replace(YARN, mscale=1.0, mscale_all_dim=1.0)


def latent(q_lora_rank: int | None = 48) -> MLAConfig:
    return replace(
        MLA,
        num_attention_heads=4,
        kv_lora_rank=32,
        q_lora_rank=q_lora_rank,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=24,
    )


def sparse(topk: int, *, interleave: bool, is_shared: bool = False) -> MLAConfig:
    """Heads enough for no two scores of exactly 0: llama.cpp leaves ties open."""
    indexer = IndexerConfig(
        index_n_heads=16,
        index_head_dim=64,
        index_topk=topk,
        rope_interleave=interleave,
        is_shared=is_shared,
    )
    return replace(latent(), indexer=indexer)


def grouped(head_dim: int = 16, **more: bool) -> GQAConfig:
    return replace(GQA, num_attention_heads=4, head_dim=head_dim, **more)


def model(
    family: str,
    attention: MLAConfig | GQAConfig | tuple[MLAConfig, ...],
    rope: RopeConfig,
    moe: MoEConfig | None = None,
    mtp: int = 0,
    **more: Any,
) -> ModelConfig:
    return configs.model_config(
        family,
        attention,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        vocab_size=97,
        rope=rope,
        moe=moe,
        num_nextn_predict_layers=mtp,
        bos_token_id=1,
        eos_token_ids=(2,),
        **more,
    )


MINICPM3 = {"scale_emb": 12.0, "scale_depth": 1.4, "dim_model_base": 256}
CONTEXT = 128
"""Tokens that llama.cpp serves, which decide about the factors of longrope."""
SERVED = MINICPM3 | {"max_position_embeddings": CONTEXT}
LONGROPE = replace(
    ROPE,
    rope_type="longrope",
    factor=2.0,
    original_max_position_embeddings=256,
    attention_factor=1.25,
    pair_factors=tuple(1 + 0.1 * pair for pair in range(8)),
    long_pair_factors=tuple(1.0 + pair for pair in range(8)),
)
V4 = replace(V3, scoring_func="softmax", router_bias=False, n_group=1, topk_group=1)
SCALED = replace(
    YARN,
    mscale=1.0,
    mscale_all_dim=1.0,
    llama_4_scaling_beta=0.1,
    original_max_position_embeddings=8,
)

MODELS = {
    "minicpm3": model("minicpm3", latent(), ROPE, **MINICPM3),
    "minicpm3-short": model("minicpm3", latent(), LONGROPE, **SERVED),
    "minicpm3-long": model(
        "minicpm3", latent(), replace(LONGROPE, original_max_position_embeddings=64), **SERVED
    ),
    "mistral4": model("mistral4", latent(), INTERLEAVED, V4),
    "mistral4-scaled": model("mistral4", latent(), SCALED, V4),
    "v3": model("deepseek_v3", latent(), YARN, V3),
    "v3-mtp": model("deepseek_v3", latent(), YARN, V3, mtp=1),
    "v3-mtp-copies": model("deepseek_v3", latent(), INTERLEAVED, V3, mtp=2, mtp_copies=True),
    "v3-dense": model("deepseek_v3", latent(), INTERLEAVED, mtp=1),
    "v3-tied": model("deepseek_v3", latent(), INTERLEAVED, V3, tie_word_embeddings=True),
    "v2": model("deepseek_v2", latent(None), YARN, V2),
    "v32": model("deepseek_v32", sparse(11, interleave=False), RELEASED_YARN, V3),
    "v32-mtp": model("deepseek_v32", sparse(11, interleave=False), INTERLEAVED, V3, mtp=1),
    "v32-dense": model("deepseek_v32", sparse(64, interleave=False), RELEASED_YARN, V3),
    "glm-dsa": model("glm_moe_dsa", sparse(11, interleave=True), INTERLEAVED, GLM),
    "glm-dsa-sharing": model(
        "glm_moe_dsa",
        tuple(sparse(11, interleave=True, is_shared=place > 0) for place in range(3)),
        INTERLEAVED,
        GLM,
    ),
    "llama": model("llama", grouped(), ROPE),
    "llama-bias": model("llama", grouped(qkv_bias=True, o_bias=True), ROPE),
    "llama3": model("llama", grouped(), LLAMA3, tie_word_embeddings=True),
    "mistral": model("mistral", grouped(), ROPE, sliding_window=512),
    "qwen2": model("qwen2", grouped(qkv_bias=True), ROPE),
    "qwen3": model("qwen3", grouped(32, qk_norm=True), ROPE),
}


def write(folder: Path, config: ModelConfig) -> Transformer:
    """Random weights whose logits depend on every part, routing biases of both signs."""
    source = Transformer(config, dtype=torch.float32).requires_grad_(False)
    for name, value in source.state_dict().items():
        value.normal_()
        if value.dim() > 1:
            value.mul_(0.15)
        elif "norm" in name:
            value.mul_(0.2).add_(1)
    save_model(source, config, folder, source=None)
    return source


@pytest.fixture
def llama(tmp_path: Path) -> Iterator[Worker]:
    with Worker(
        "llama.cpp", "lowlat.peers.llama_cpp_model", python=PYTHON, threads=1, folder=tmp_path
    ) as worker:
        yield worker


@pytest.mark.parametrize("name", MODELS)
def test_logits(tmp_path: Path, llama: Worker, name: str) -> None:
    expected, found = both_logits(tmp_path, llama, MODELS[name])
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_a_window_shorter_than_the_text(
    tmp_path: Path, llama: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    """llama.cpp attends beyond it, of which the conversion warns; up to it logits are the same."""
    window = 7
    config = model("mistral", grouped(), ROPE, sliding_window=window)
    expected, found = both_logits(tmp_path, llama, config)
    assert "llama.cpp reads no sliding_window of mistral" in caplog.text
    error = np.abs(found - expected).max(axis=1) / np.abs(expected).max()
    assert error[:window].max() <= TOLERANCE < 1e-3 < error[window:].min()


def both_logits(
    tmp_path: Path, llama: Worker, config: ModelConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Of TOKENS, in fp32: lowlat's of random weights, and llama.cpp's of the file made of them."""
    source = write(tmp_path / "m", config)
    convert(tmp_path / "m", tmp_path / "m.gguf", dtype="fp32")
    backend = PackedAttention([len(TOKENS)])
    with torch.no_grad():
        hidden = source(torch.tensor(TOKENS), backend.positions(), backend)
        expected = source.logits(hidden).numpy()
    llama.ask(
        "load",
        model=str(tmp_path / "m.gguf"),
        precision="fp32",
        cache="fp32",
        threads=1,
        context=CONTEXT,
    )
    return expected, logits_of(llama, TOKENS)


TOKENIZE = """
import json, sys
from llama_cpp import Llama
model = Llama(sys.argv[1], vocab_only=True, verbose=False)
ids = [model.tokenize(text.encode(), special=True, add_bos=False) for text in sys.argv[2:]]
print(json.dumps(ids))
"""


def test_a_trained_model(tmp_path: Path, llama: Worker) -> None:
    """minnow, whose vocabulary `data build --train-bpe` made: tokens and logits."""
    source, path = load("minnow", dtype="fp32"), tmp_path / "minnow.gguf"
    convert(prepare("minnow"), path, dtype="fp32")
    texts = [*PROBES, "cafe\u0301 <|im_start|>user\nhi<|im_end|>"]
    command = [PYTHON, "-c", TOKENIZE, str(path), *texts]
    found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert found == [source.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    ids = source.tokenizer.encode("She looked at him, and the cache was cold.")
    llama.ask("load", model=str(path), precision="fp32", cache="fp32", threads=1, context=128)
    expected = source.logits(ids).numpy()
    assert np.abs(logits_of(llama, ids) - expected).max() <= TOLERANCE * np.abs(expected).max()


CHAT = """
import json, sys
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=256, n_threads=1, verbose=False)
ids = [model.tokenize(text.encode(), special=True, add_bos=False) for text in sys.argv[3:]]
answer = model.create_chat_completion(
    [{"role": "user", "content": "What is 2+2?"}], max_tokens=8, temperature=0)
with open(sys.argv[2], "w") as out:
    json.dump({"ids": ids, "text": answer["choices"][0]["message"]["content"]}, out)
"""


def test_text(smollm_gguf: Path, tmp_path: Path) -> None:
    """A real model goes through a folder and speaks: its tokens and its answer are the source's."""
    convert(smollm_gguf, tmp_path / "m", dtype="int4")
    convert(tmp_path / "m", tmp_path / "m.gguf")
    texts = ["Hello, <|im_start|>user\n world 123", "naïve 日本語\n\n  x  \t'll", "I'll 1.5e-3!"]
    answers = []
    for path in (smollm_gguf, tmp_path / "m.gguf"):
        out = tmp_path / "answer.json"
        subprocess.run([PYTHON, "-c", CHAT, str(path), str(out), *texts], check=True)
        answers.append(json.loads(out.read_text()))
    assert answers[0] == answers[1]
    tokenizer = Tokenizer.from_folder(tmp_path / "m")
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert answers[1]["ids"] == ids


def test_reading_back_is_the_same_model(tmp_path: Path) -> None:
    """What llama.cpp is given is what lowlat gets back."""
    source = write(tmp_path / "m", MODELS["v3-mtp-copies"])
    convert(tmp_path / "m", tmp_path / "m.gguf", dtype="fp32")
    found = load_model(tmp_path / "m.gguf").model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in source.state_dict().items())
