"""Random LoRA adapters for tests: updates of a model's projections, folders in PEFT's layout."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lowlat.checkpoint.mapping import file_name
from lowlat.config.model import ModelConfig
from lowlat.model.linear import Linear
from lowlat.model.lora import LowRankUpdate
from lowlat.model.transformer import Transformer

ATTENTION = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "q_a_proj",
    "q_b_proj",
    "kv_a_proj_with_mqa",
    "kv_b_proj",
)
MLP = ("gate_proj", "up_proj", "down_proj")


def projections(model: Transformer, names: tuple[str, ...]) -> dict[str, Linear]:
    """The projections of decoder layers with one of `names`, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, Linear)
        and path.startswith("layers.")
        and path.rpartition(".")[2] in names
    }


def drawn_updates(
    model: Transformer, *, rank: int, seed: int, names: tuple[str, ...] = ATTENTION + MLP
) -> dict[str, LowRankUpdate]:
    """An adapter whose updates are about half as large as the weights; values have few bits, so
    bf16 holds them."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(rows: int, columns: int, scale: float) -> torch.Tensor:
        values = scale * torch.randn(rows, columns, generator=generator)
        return values.bfloat16().float()

    return {
        path: LowRankUpdate(
            drawn(rank, module.in_features, 1 / math.sqrt(module.in_features)),
            drawn(module.out_features, rank, 0.5 / math.sqrt(rank)),
        )
        for path, module in projections(model, names).items()
    }


def save_adapter(
    folder: Path,
    config: ModelConfig,
    updates: Mapping[str, LowRankUpdate],
    *,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Path:
    """`updates` in PEFT's layout, with `settings` in adapter_config.json; its scaling is 2, which
    is taken out of B."""
    rank = len(next(iter(updates.values())).a)
    tensors = {}
    for path, update in updates.items():
        module = "base_model.model." + file_name(config, f"{path}.").removesuffix(".")
        tensors[f"{module}.lora_A.weight"] = update.a.to(dtype).contiguous()
        tensors[f"{module}.lora_B.weight"] = (update.b / 2).to(dtype).contiguous()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none"} | settings
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder
