"""Write a checkpoint of random weights in the Hugging Face layout, reproducible by seed.

    python benchmarks/random_checkpoint.py mini /tmp/mini --seed 0

Every tensor has its own random stream, keyed by seed and name, and is written before the next one
is drawn. Weights are bf16; the router's selection biases are fp32, of both signs. The tokenizer has
the 256 bytes; its other entries only fill the vocabulary.
"""

import argparse
import hashlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from torch import Tensor

from lowlat.checkpoint.save import file_tensors, write_checkpoint
from lowlat.config.hf.reader import config_from_hf
from lowlat.config.hf.writer import config_to_hf
from lowlat.config.model import ModelConfig
from lowlat.config.parameter_count import count_parameters
from lowlat.model.transformer import Transformer
from lowlat.text.parts import TokenizerParts
from lowlat.text.token_bytes import byte_alphabet
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError

DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "rope_theta": 10000.0,
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 0,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
PRESETS: dict[str, dict[str, Any]] = {
    # 721.8M parameters, 204.6M active, 13,824 bytes of cache per token in bf16
    "mini": {
        "hidden_size": 1024,
        "num_hidden_layers": 12,
        "first_k_dense_replace": 1,
        "intermediate_size": 2816,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": 384,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 32,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 512,
        "vocab_size": 32000,
        "max_position_embeddings": 163840,
    },
    # `mini`, with the same weights of the tensors it shares, and an indexer in every layer
    "mini-dsa": {"model_type": "deepseek_v32"},
    # an indexer in every fourth layer, whose choice the next three share
    "mini-shared-dsa": {
        "model_type": "glm_moe_dsa",
        "index_topk_freq": 4,
        "index_skip_topk_offset": 1,
    },
    # runs for a second in every program: for tests of the benchmark itself
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "intermediate_size": 160,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 32,
        "vocab_size": 512,
        "max_position_embeddings": 16384,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    # the shapes of DeepSeek-V2-Lite (no query latent), five layers of it
    "lite": {
        "model_type": "deepseek_v2",
        "hidden_size": 2048,
        "num_hidden_layers": 5,
        "first_k_dense_replace": 1,
        "intermediate_size": 10944,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 2,
        "moe_intermediate_size": 1408,
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "vocab_size": 32000,
        "max_position_embeddings": 163840,
    },
    # 5.2B parameters, 10.4 GB: experts of V2-Lite, everything else of V3, an MTP module
    "large": {
        "hidden_size": 2048,
        "num_hidden_layers": 8,
        "num_nextn_predict_layers": 1,
        "first_k_dense_replace": 1,
        "intermediate_size": 10944,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": 768,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_group": 8,
        "topk_group": 4,
        "n_shared_experts": 2,
        "moe_intermediate_size": 1408,
        "vocab_size": 128000,
        "max_position_embeddings": 163840,
    },
}
INDEXER = {"index_n_heads": 8, "index_head_dim": 128, "index_topk": 2048}
for _name in ("mini-dsa", "mini-shared-dsa"):
    PRESETS[_name] = PRESETS["mini"] | INDEXER | PRESETS[_name]


def config_of(preset: str) -> ModelConfig:
    """The preset's config. Raises UserError for an unknown one."""
    if preset not in PRESETS:
        raise UserError(f"preset '{preset}' is unknown; choose one of {', '.join(PRESETS)}")
    return config_from_hf(DEEPSEEK_V3 | PRESETS[preset], source=preset)


def write(preset: str, folder: Path, *, seed: int) -> ModelConfig:
    """Write the preset's checkpoint to the new folder `folder`. Returns its config."""
    config = config_of(preset)
    with torch.device("meta"):
        shapes = Transformer(config, dtype=torch.bfloat16).state_dict()
    raw = config_to_hf(config) | {"dtype": "bfloat16"}
    tensors = draw(file_tensors(config, shapes), config.initializer_range, seed)
    write_checkpoint(folder, raw, tensors, extra_files=tokenizer_files(config.vocab_size))
    return config


def draw(
    shapes: Iterator[tuple[str, Tensor]], std: float, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Random tensors for the given names, shapes and dtypes."""
    for name, shape in shapes:
        key = hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16]
        stream = np.random.Generator(np.random.Philox(key=np.frombuffer(key, np.uint64)))
        values = torch.from_numpy(stream.standard_normal(tuple(shape.shape), np.float32))
        if name.endswith("e_score_correction_bias"):
            values *= 0.05
        elif shape.dim() == 1:  # norms
            values = 1 + 0.1 * values
        else:
            values *= std
        yield name, values.to(shape.dtype)


def tokenizer_files(vocab_size: int) -> dict[str, bytes]:
    """tokenizer.json and its settings: 256 bytes, <s>, </s>, then unreachable entries."""
    alphabet = byte_alphabet()
    special = ["<s>", "</s>"]
    filler = {f"filler {index}": index for index in range(len(alphabet) + 2, vocab_size)}
    vocab = alphabet | {token: len(alphabet) + place for place, token in enumerate(special)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab | filler, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    parts = TokenizerParts(
        backend=backend,
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
        eos_ids=frozenset({len(alphabet) + 1}),
        chat_template=None,
        origin="random checkpoint",
    )
    with tempfile.TemporaryDirectory() as folder:
        Tokenizer(parts).save(Path(folder))
        return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("preset", help=", ".join(PRESETS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    try:
        config = write(given.preset, given.folder, seed=given.seed)
    except UserError as error:
        sys.exit(f"error: {error}")
    count = count_parameters(config)
    print(
        f"{given.folder}: {count.total / 1e6:,.1f}M parameters, "
        f"{count.active_without_embedding / 1e6:,.1f}M active"
    )


if __name__ == "__main__":
    main()
