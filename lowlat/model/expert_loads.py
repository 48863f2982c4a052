"""Expert loads: how many tokens every routed expert of a model gets, counted by hooks on the gates.

Native kernels route inside a step and call no gate.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lowlat.model.block import DecoderLayer
from lowlat.model.moe import Gate, MoE
from lowlat.model.transformer import Transformer
from lowlat.ops.routing import Routing


def gates(model: Transformer) -> Iterator[tuple[int, Gate]]:
    """Every gate that this process has, with its layer; MTP modules are numbered after the decoder
    layers.
    """
    blocks = [*model.layers, *(module.block for module in model.mtp)]
    for layer, block in enumerate(blocks):
        if isinstance(block, DecoderLayer) and isinstance(block.mlp, MoE):
            yield layer, block.mlp.gate


@contextmanager
def count_expert_loads(model: Transformer) -> Iterator[dict[int, Int[Tensor, " experts"]]]:
    """Within this context, the yielded object holds the tokens of every expert by decoder layer,
    for steps that PyTorch runs.
    """
    loads: dict[int, Tensor] = {}
    hooks = []
    for layer, gate in gates(model):
        if layer >= model.config.num_hidden_layers:
            continue
        loads[layer] = torch.zeros(gate.moe.n_routed_experts, dtype=torch.int64)
        hooks.append(gate.register_forward_hook(_counter(loads[layer])))
    try:
        yield loads
    finally:
        for hook in hooks:
            hook.remove()


def _counter(total: Int[Tensor, " experts"]):
    def hook(_module: nn.Module, _inputs: object, routing: Routing) -> None:
        total.add_(torch.bincount(routing.experts.flatten().cpu(), minlength=len(total)))

    return hook
