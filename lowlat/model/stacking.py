"""Routed experts as one MLP each, as files and inference have them, or stacked, as training has
them.

Owns both directions; the two forms of the module are `moe`'s.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lowlat.config.model import ModelConfig
from lowlat.model.moe import Experts, MoE, StackedExperts
from lowlat.model.transformer import Transformer

GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"


def stack_experts(model: Transformer) -> None:
    """Give every layer of `model` its experts stacked; one layer is in memory twice at a time."""
    for module in model.modules():
        if isinstance(module, MoE) and isinstance(module.experts, Experts):
            module.experts = StackedExperts(module.experts)


def unstacked(parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The same parameters by the names of a model without stacked experts; views, not copies."""
    for name, tensor in parameters.items():
        prefix = name.removesuffix("gate_up_proj").removesuffix("down_proj")
        if name.endswith(GATE_UP):
            for expert, matrix in enumerate(tensor):
                gate, up = matrix.chunk(2)
                yield f"{prefix}{expert}.gate_proj.weight", gate
                yield f"{prefix}{expert}.up_proj.weight", up
        elif name.endswith(DOWN):
            for expert, matrix in enumerate(tensor):
                yield f"{prefix}{expert}.down_proj.weight", matrix
        else:
            yield name, tensor


def stacked(config: ModelConfig, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `unstacked`."""
    result: dict[str, Tensor] = {}
    count = 0 if config.moe is None else config.moe.n_routed_experts
    for name, tensor in parameters.items():
        head, found, rest = name.rpartition(".experts.")
        if not found:
            result[name] = tensor
        elif rest == "0.gate_proj.weight":
            prefix = head + found
            read = [
                [parameters[f"{prefix}{e}.{part}_proj.weight"] for part in ("gate", "up", "down")]
                for e in range(count)
            ]
            result[f"{prefix}gate_up_proj"] = torch.stack([torch.cat(r[:2]) for r in read])
            result[f"{prefix}down_proj"] = torch.stack([r[2] for r in read])
    return result
