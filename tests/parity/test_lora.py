"""LoRA adapters that peft saves give the logits of peft on transformers in fp32."""

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, PreTrainedConfig

from lowlat.api import load
from lowlat.generate.model import Model

# of peft, in transformers
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")
SIZES: dict[str, Any] = {
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "vocab_size": 71,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
LLAMA = LlamaConfig(**SIZES, num_attention_heads=6, num_key_value_heads=2, head_dim=8)
V3: dict[str, Any] = {
    **SIZES,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "kv_lora_rank": 13,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 7,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
}
MLA_ATTENTION = ["q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
CASES: dict[str, tuple[PreTrainedConfig, dict[str, Any]]] = {
    "llama-attention": (LLAMA, {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
    "llama-all": (LLAMA, {"target_modules": "all-linear", "use_rslora": True}),
    "llama-patterns": (
        LLAMA,
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"down_proj": 7, "layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"model.layers.2.self_attn.q_proj": 11, "down_proj": 3},
        },
    ),
    "deepseek_v3": (DeepseekV3Config(**V3, q_lora_rank=11), {"target_modules": MLA_ATTENTION}),
    "deepseek_v3-no-query-latent": (
        DeepseekV3Config(**V3, q_lora_rank=None),
        {"target_modules": MLA_ATTENTION},
    ),
}


def randomized(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                width = 0.5 if "lora_B" in name else parameter.shape[-1] ** -0.5
                parameter.copy_(width * torch.randn(parameter.shape, generator=generator))


References = dict[str | None, nn.Module]
"""peft's model by the name of its adapter, None for the base model."""


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Model, References]:
    """lowlat's model with two adapters, and peft's with one of them or none."""
    config, settings = CASES[request.param]
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    base.save_pretrained(tmp_path / "base")
    references: References = {None: base}
    for name, alpha in (("one", 9), ("two", 4)):
        fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        tuned = get_peft_model(fresh, LoraConfig(r=5, lora_alpha=alpha, **settings)).eval()
        randomized(tuned, alpha)
        tuned.save_pretrained(str(tmp_path / name))
        references[name] = tuned
    folders = {name: tmp_path / name for name in ("one", "two")}
    return load(tmp_path / "base", dtype="fp32", lora=folders), references


@torch.no_grad()
def test_logits_are_those_of_peft(pair: tuple[Model, References]) -> None:
    model, references = pair
    ids = torch.randint(0, 71, (29,), generator=torch.Generator().manual_seed(4))
    found = []
    for name, reference in references.items():
        expected = reference(ids[None]).logits[0]
        ours = model.logits(ids.tolist(), lora=name)
        assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()
        found.append(ours)
    for one, other in pairwise(found):
        assert (one - other).norm() > 0.1 * one.norm()


@torch.no_grad()
def test_a_batch_of_adapters_gives_the_tokens_of_each(pair: tuple[Model, References]) -> None:
    model, references = pair
    rng = random.Random(5)
    prompts = [[rng.randrange(71) for _ in range(rng.randint(1, 30))] for _ in range(9)]
    names = [*references] * 3
    batch = model.generate_many(prompts, lora=names, max_tokens=6, ignore_eos=True)
    for prompt, name, (completion,) in zip(prompts, names, batch, strict=True):
        known = torch.tensor([[*prompt, *completion.token_ids]])
        logits = references[name](known).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        # greedy up to rounding
        assert (logits.max(dim=-1).values - chosen).max() < 1e-3
