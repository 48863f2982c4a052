"""LoRA adapter export: write updates in peft's layout (adapter_config.json,
adapter_model.safetensors).
"""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lowlat.checkpoint.mapping import file_name
from lowlat.checkpoint.padded_latent import pad_columns, pad_rows
from lowlat.checkpoint.safetensors.writer import PYTORCH, file_pieces
from lowlat.config.hf.families import LOWLAT, MLA_FAMILIES
from lowlat.config.model import MLAConfig, ModelConfig
from lowlat.train.recipe.schema import LoraConfig
from lowlat.train.step.lora import EXPERT_PROJECTIONS, UPDATE
from lowlat.utils.errors import UserError

PREFIX = "base_model.model."

_log = logging.getLogger(__name__)


def write_adapter(
    config: ModelConfig,
    updates: Mapping[str, Tensor],
    table: LoraConfig,
    dst: Path,
    *,
    base_model: Path,
) -> None:
    """Write `updates`, by parameter name, as the folder `dst`, which must not exist.

    `base_model` is the checkpoint that they were trained on. Updates of MTP modules are omitted,
    because programs that load adapters have no MTP modules.

    In families with experts, peft loads updates of MLPs as updates of fused experts: a warning is
    logged, and every expert has tensors of its own, which lowlat loads.

    Raises UserError if `dst` exists, and for updates that the layout cannot hold: of queries with a
    bias in exactly converted models.
    """
    tensors = dict(_tensors(config, updates))
    modules = sorted({name.rpartition(".lora_")[0].removeprefix(PREFIX) for name in tensors})
    text = json.dumps(_settings(table, modules, base_model), indent=2) + "\n"
    try:
        dst.mkdir()
        with (dst / "adapter_model.safetensors").open("wb") as file:
            file.writelines(file_pieces(list(tensors.items()), PYTORCH))
        (dst / "adapter_config.json").write_text(text, encoding="utf-8")
    except FileExistsError as error:
        raise UserError(f"{dst}: exists already; choose another destination") from error
    except OSError as error:
        raise UserError(f"{dst}: cannot be written ({error.strerror})") from error


def _tensors(config: ModelConfig, updates: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    is_fused = False
    for name, tensor in updates.items():
        owner, _, part = name.partition(UPDATE)
        if owner.startswith("mtp."):
            continue
        own = owner.rpartition(".")[2]
        path = file_name(config, f"{owner}.").removesuffix(".")
        is_fused |= own == "experts"
        is_fused |= own in EXPERT_PROJECTIONS and config.model_type in MLA_FAMILIES
        if own == "experts":
            for number, update in enumerate(tensor):
                yield f"{PREFIX}{path}.{number}.{part}.weight", update.contiguous()
        else:
            yield f"{PREFIX}{path}.{part}.weight", _in_file(config, owner, part, tensor)
    if is_fused:
        _log.warning(
            "in models of type %s peft loads MLP updates as updates of fused experts; load this "
            "adapter with lowlat",
            config.model_type,
        )


def _in_file(config: ModelConfig, owner: str, part: str, tensor: Tensor) -> Tensor:
    """`tensor` padded to the shape of the weight of module `owner` in checkpoint files."""
    attention = config.attention
    is_padded = config.model_type != LOWLAT
    if not isinstance(attention, MLAConfig) or attention.kv_a_layernorm or not is_padded:
        return tensor
    rank = attention.kv_lora_rank
    match owner.rpartition(".")[2], part:
        case "q_proj", _ if attention.q_bias:
            raise UserError(
                f"{owner}: peft's layout cannot hold this update in an exactly converted model "
                "whose queries have a bias; export the merged model"
            )
        case "kv_a_proj_with_mqa", "lora_B":
            return pad_rows(tensor, rank)
        case "kv_b_proj", "lora_A":
            return pad_columns(tensor, rank)
    return tensor


def _settings(table: LoraConfig, modules: list[str], base_model: Path) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_model),
        "r": table.rank,
        "lora_alpha": table.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": modules,
    }
