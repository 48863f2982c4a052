"""Routed experts stacked into two parameters per layer for grouped products, and the conversion of
state dicts to and from one MLP per expert, as checkpoints and inference have them.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowlat.model.moe import MLP, Experts
from lowlat.model.replace_modules import replace_modules
from lowlat.model.transformer import Transformer
from lowlat.ops.grouped import stacked_experts
from lowlat.ops.routing import Routing

GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"

Products = Callable[[Tensor, Routing, Tensor, Tensor], Tensor]
"""(tokens, routing, gate_up_proj, down_proj) -> combined outputs, as `ops.grouped.stacked_experts`.
"""


class StackedExperts(nn.Module):
    """The routed experts as two parameters: all experts of a layer in one grouped product, with one
    optimizer state and one tensor to shard.

    gate_up_proj [experts, 2 inner, hidden] holds every expert's gate rows, then its up rows;
    down_proj [experts, hidden, inner].
    """

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        mlps = [expert for expert in experts if isinstance(expert, MLP)]
        self.gate_up_proj = nn.Parameter(
            torch.stack(
                [torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach() for mlp in mlps]
            )
        )
        self.down_proj = nn.Parameter(torch.stack([mlp.down_proj.weight.detach() for mlp in mlps]))
        self.products: Products = stacked_experts

    def forward(
        self, x: Float[Tensor, "tokens hidden"], routing: Routing
    ) -> Float[Tensor, "tokens hidden"]:
        return self.products(x, routing, self.gate_up_proj, self.down_proj)


def stack_experts(model: Transformer) -> None:
    """Replace the experts of every layer of `model` by `StackedExperts`, one layer at a time: peak
    memory is the model plus one layer.
    """
    replace_modules(
        model,
        lambda _path, module: StackedExperts(module) if isinstance(module, Experts) else None,
    )


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
