"""Reads single routed experts of a checkpoint, for expert load balancing (EPLB) while serving."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from lowlat.checkpoint.load import open_weights, read_parameters
from lowlat.checkpoint.mapping import operations
from lowlat.checkpoint.stored_blocks import store_blocks
from lowlat.checkpoint.tensor_source import TensorSource
from lowlat.config.model import ModelConfig
from lowlat.model.lora import LowRankUpdate, add_adapters
from lowlat.model.moe import MLP
from lowlat.model.quant import store_configured
from lowlat.utils.progress import SilentProgress

Wanted = Mapping[int, set[int]]
"""Numbers of experts by layer."""


def read_experts(
    checkpoint: Path | TensorSource,
    adapters: Sequence[Mapping[str, LowRankUpdate]],
    wanted: Wanted,
    *,
    dtype: str,
) -> dict[int, dict[int, nn.Module]]:
    """Routed experts by layer and number, with their updates of `adapters`, as `load_model` loads
    them with `keeps_blocks`. Other modules of the model are not built."""
    if not any(wanted.values()):
        return {}
    opened = open_weights(checkpoint, dtype)
    source, config = opened.source, opened.config
    model = _empty_experts(config, wanted)
    parameters = model.state_dict()
    plan = operations(config, parameters, stored=opened.file, source=source)
    # a file may store all experts of a layer as one tensor
    plan = [step for step in plan if parameters.keys() & set(step.parameters())]
    shapes = _shapes(config, model)
    # a few experts, however large the model
    readers = store_blocks(model, plan, source, part=0.0) if opened.can_keep_blocks else {}
    filled = read_parameters(
        *(opened, model, plan, shapes, readers, torch.device("cpu"), SilentProgress()),
        rows_of=lambda name, tensor: tensor,
    )
    model.load_state_dict(filled, strict=True, assign=True)
    add_adapters(model, adapters)
    return {
        layer: {number: model.get_submodule(_path(layer, number)) for number in own}
        for layer, own in wanted.items()
        if own
    }


def _path(layer: int, number: int) -> str:
    return f"layers.{layer}.mlp.experts.{number}"


def _empty_experts(config: ModelConfig, wanted: Wanted) -> nn.Module:
    """Unfilled experts on the meta device, by the names that they have in the model."""
    assert config.moe is not None
    width = config.moe.moe_intermediate_size
    layers = nn.ModuleDict()
    with torch.device("meta"):
        for layer, numbers in wanted.items():
            experts = nn.ModuleDict()
            for number in sorted(numbers):
                experts[str(number)] = MLP(config.hidden_size, width, dtype=torch.float32)
            layers[str(layer)] = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": experts})})
        model = nn.ModuleDict({"layers": layers})
        store_configured(model, config)
    return model


def _shapes(config: ModelConfig, model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of `model`, and of the same layers' expert 0, by which operations
    compute those of stacked experts."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.state_dict().items():
        head, _, rest = name.partition(".experts.")
        projection = rest.partition(".")[2]
        shapes[name] = shapes[f"{head}.experts.0.{projection}"] = tuple(parameter.shape)
    return shapes
