"""Linear layers and experts that defer their weight gradients: what zero-bubble pipeline schedules
fill bubbles with (arXiv 2401.10241; DeepSeek-V3 section 3.2.1, DualPipe).
"""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowlat.model.linear import Linear
from lowlat.model.replace_modules import adopt, replace_modules
from lowlat.ops.deferred import Defer, deferred_linear
from lowlat.ops.grouped import stacked_experts
from lowlat.train.layers.stacked_experts import StackedExperts


class DeferredLinear(Linear):
    """Linear with a plain weight, whose gradient the backward pass leaves to `defer`."""

    def __init__(self, linear: Linear, defer: Defer) -> None:
        adopt(self, linear)
        self._defer = defer

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        if torch.is_grad_enabled():
            return deferred_linear(x, self.weight, self.bias, self._defer)
        return super().forward(x)


class DeferredExperts(StackedExperts):
    """`StackedExperts` whose weight gradients the backward pass leaves to `defer`."""

    def __init__(self, experts: StackedExperts, defer: Defer) -> None:
        adopt(self, experts)
        self.products = partial(stacked_experts, defer=defer)


def defer_weight_gradients(module: nn.Module, defer: Defer) -> None:
    """Replace the linear layers and stacked experts below `module` by deferring ones.

    Those of FP8 training keep their own backward pass.
    """

    def deferred(_path: str, part: nn.Module) -> nn.Module | None:
        if type(part) is Linear:
            return DeferredLinear(part, defer)
        return DeferredExperts(part, defer) if type(part) is StackedExperts else None

    replace_modules(module, deferred)
