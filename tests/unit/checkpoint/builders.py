"""Small checkpoints of every family, and raw safetensors bytes for tests that break them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowlat.checkpoint.save import save_model
from lowlat.config.model import IndexerConfig, ModelConfig, QuantConfig, RopeConfig
from lowlat.convert.parameters.exact_mla import mla_config
from lowlat.model.transformer import Transformer
from lowlat.utils.errors import UserError
from tests import configs
from tests.configs import GQA, INTERLEAVED, MLA, MOE

V2_MOE = replace(
    MOE, scoring_func="softmax", topk_method="greedy", norm_topk_prob=False, scale_after_norm=False
)


def gqa(family: str, **changes: Any) -> ModelConfig:
    attention = replace(GQA, qkv_bias=family == "qwen2", qk_norm=family == "qwen3")
    return model_config(family, attention=attention, **changes)


def mla(family: str, **changes: Any) -> ModelConfig:
    """MLA; one dense layer, then experts."""
    fields: dict[str, Any] = {"attention": MLA, "moe": MOE, "rope": INTERLEAVED}
    if family == "deepseek_v2":
        fields |= {"attention": replace(MLA, q_lora_rank=None), "moe": V2_MOE}
    return model_config(family, **(fields | changes))


def model_config(family: str, **fields: Any) -> ModelConfig:
    ends = {"bos_token_id": 1, "eos_token_ids": (2,)}
    return configs.model_config(family, **(ends | fields))


MISTRAL4_MOE = replace(MOE, scoring_func="softmax", router_bias=False)
SCALED = replace(INTERLEAVED, llama_4_scaling_beta=0.1, original_max_position_embeddings=5)
PLAIN = RopeConfig(rope_theta=INTERLEAVED.rope_theta)
SCALES = {"scale_emb": 12.0, "scale_depth": 1.4, "dim_model_base": 5}
FP8 = QuantConfig(weight_block_size=(8, 5), modules_to_not_convert=("model.layers.0.mlp",))

INDEXER = IndexerConfig(index_n_heads=5, index_head_dim=8, index_topk=7)
SPARSE = replace(MLA, indexer=INDEXER)
SPARSE_GLM = replace(MLA, indexer=replace(INDEXER, rope_interleave=True))
SHARING = (SPARSE_GLM, replace(MLA, indexer=replace(SPARSE_GLM.indexer, is_shared=True)))

FAMILIES: dict[str, ModelConfig] = {
    "deepseek_v2": mla("deepseek_v2"),
    "deepseek_v3": mla("deepseek_v3"),
    "deepseek_v3-mtp": mla("deepseek_v3", num_nextn_predict_layers=2),
    "deepseek_v3-mtp-copies": mla("deepseek_v3", num_nextn_predict_layers=1, mtp_copies=True),
    "deepseek_v3-fp8": mla("deepseek_v3", num_nextn_predict_layers=1, quantization=FP8),
    "deepseek_v32": mla("deepseek_v32", attention=SPARSE, num_nextn_predict_layers=1),
    "deepseek_v32-fp8": mla("deepseek_v32", attention=SPARSE, quantization=FP8),
    "glm_moe_dsa": mla("glm_moe_dsa", attention=SPARSE_GLM),
    "glm_moe_dsa-sharing": mla("glm_moe_dsa", attention=SHARING, num_nextn_predict_layers=1),
    "kimi_k2": mla("kimi_k2"),
    "glm4_moe_lite": mla("glm4_moe_lite", num_nextn_predict_layers=1),
    "mistral4": mla("mistral4", moe=MISTRAL4_MOE, rope=SCALED),
    "axk1": mla("axk1", moe=replace(MOE, output_norm=True)),
    "axk1-unbiased": mla("axk1", moe=replace(MOE, output_norm=True, router_bias=False)),
    "youtu": mla("youtu", moe=None, tie_word_embeddings=True),
    "minicpm3": mla("minicpm3", moe=None, rope=PLAIN, **SCALES),
    "llama": gqa("llama"),
    "llama-tied": gqa("llama", tie_word_embeddings=True),
    "mistral": gqa("mistral", sliding_window=7),
    "qwen2": gqa("qwen2", tie_word_embeddings=True),
    "qwen3": gqa("qwen3"),
    "llama-converted": mla_config(gqa("llama")),
    "qwen2-converted": mla_config(gqa("qwen2")),
}


def random_model(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> Transformer:
    """Every number random, router biases and fp8 scales included."""
    model = Transformer(config, dtype=dtype).requires_grad_(False)
    for name, value in model.state_dict().items():
        drawn = torch.randn(value.shape)
        value.copy_(drawn.abs() if name.endswith("_scale_inv") else drawn)
    return model


def write_model(folder: Path, config: ModelConfig, **options: Any) -> Transformer:
    model = random_model(config)
    save_model(model, config, folder, source=None, **options)
    return model


def raw_safetensors(
    header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None
) -> bytes:
    """The bytes of a safetensors file; `length` overrides the header length written."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def rewrite(folder: Path, change: Any) -> None:
    """Apply `change` to the tensors (name -> tensor) of a single-file checkpoint, with the
    safetensors library as writer."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def assert_refused(read: Callable[[], object], path: Path, words: str) -> None:
    """`read` raises one line that begins with `path` and holds `words`."""
    with pytest.raises(UserError) as caught:
        read()
    text = str(caught.value)
    assert text.startswith(str(path)) and words in text, text
    assert "\n" not in text and len(text) < 600


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_same_bits(left: Transformer, right: Transformer) -> None:
    ours, theirs = left.state_dict(), right.state_dict()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert value.shape == theirs[name].shape, name
        assert torch.equal(bits(value), bits(theirs[name])), name
