"""Backward pass of GRPO: attention and MLP of each decoder layer are recomputed in PyTorch from the
residual stream that the kernels stored, with the experts they chose (routing replay).
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from lowlat.attention.base import AttentionBackend
from lowlat.attention.flash import FlashAttention
from lowlat.model.block import DecoderLayer
from lowlat.model.expert_loads import gates
from lowlat.model.linear import Linear
from lowlat.model.moe import Gate, MoE
from lowlat.model.replace_modules import adopt, replace_modules
from lowlat.model.transformer import Transformer
from lowlat.ops import bf16_products
from lowlat.ops.rope import RotaryTable
from lowlat.ops.routing import Routing, route
from lowlat.train.layers.fused import use_fused_layers
from lowlat.train.layers.stacked_experts import stack_experts
from lowlat.train.policy.balance import SequenceBalance
from lowlat.train.policy.forward import PolicyPass
from lowlat.train.policy.weights import PolicyWeights, substituted

ATTENTION = ("self_attn.", "input_layernorm.")
MLP = ("mlp.", "post_attention_layernorm.")
"""Prefixes of the parameters of both halves of a layer."""


class ReplayedGate(Gate):
    """Router that repeats `chosen`, experts and factors of another pass; gradients are those of its
    own factors for these experts.
    """

    def __init__(self, gate: Gate) -> None:
        adopt(self, gate)
        self.chosen: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Float[Tensor, "tokens hidden"]) -> Routing:
        assert self.chosen is not None
        experts, gates = self.chosen
        routing = route(x, self.weight, None, self.moe, experts.long())
        return routing._replace(weights=substituted(gates, routing.weights))


class HalvedLayer(DecoderLayer):
    """Decoder layer whose forward pass is one of its halves."""

    def __init__(self, layer: DecoderLayer) -> None:
        adopt(self, layer)

    def forward(
        self,
        x: Float[Tensor, "tokens hidden"],
        rope: RotaryTable | None = None,
        attention: AttentionBackend | None = None,
    ) -> Float[Tensor, "tokens hidden"]:
        """`x` plus the output of the attention, or without `attention` of MLP or experts."""
        if attention is None:
            return x + self.feed_forward(x)
        assert rope is not None
        return x + self.attend(x, rope, attention)


class PortableLinear(Linear):
    """Linear without bias, fast also on CPUs without bf16 GEMM (`ops.bf16_products`)."""

    def __init__(self, linear: Linear) -> None:
        adopt(self, linear)

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        return bf16_products.linear(x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


class PolicyBackward:
    """Backward passes to the master weights of `weights`."""

    def __init__(self, weights: PolicyWeights, balance: SequenceBalance) -> None:
        """balance: its loss is added to gates of the decoder and of MTP modules."""
        self._weights = weights
        with torch.device("meta"):
            model = Transformer(weights.config)
            stack_experts(model)
        use_fused_layers(model)
        replace_modules(model, _replayed)
        for _, gate in gates(model):
            balance.watch(gate)
        self.model = model
        """On the meta device; decoder layers replay routing."""

    def run(self, run: PolicyPass, grad: Float[Tensor, "tokens hidden"]) -> None:
        """Add the gradients of a loss to those of the master weights, given its gradient `grad` by
        `run.hidden`; the head's own gradient is not included.
        """
        assert run.kept is not None
        residuals = run.kept.residuals
        attention = FlashAttention(run.lengths)
        tables = self.model.rotary(attention.positions())
        norm = self._weights.differentiable("norm.")
        grad = _backward(self.model.norm, norm, (residuals[-1],), grad)
        for number in reversed(range(self._weights.config.num_hidden_layers)):
            layer = self.model.layers[number]
            assert isinstance(layer, HalvedLayer)
            own, mlp = (
                self._weights.differentiable(f"layers.{number}.", half) for half in (ATTENTION, MLP)
            )
            self._replay_routing(layer, run, number)
            grad = _backward(layer, mlp, (residuals[2 * number + 1],), grad)
            rope = self.model.rotary.of(number, tables)
            grad = _backward(layer, own, (residuals[2 * number], rope, attention), grad)
        self._embedding(run, grad)

    @staticmethod
    def _replay_routing(layer: HalvedLayer, run: PolicyPass, number: int) -> None:
        if not isinstance(layer.mlp, MoE):
            return
        assert run.kept is not None and run.kept.experts is not None and run.kept.gates is not None
        gate = layer.mlp.gate
        assert isinstance(gate, ReplayedGate)
        gate.chosen = run.kept.experts[number], run.kept.gates[number]

    def _embedding(self, run: PolicyPass, grad: Tensor) -> None:
        """In fp32: a token's gradient is summed over all its occurrences."""
        master = self._weights.master("embed_tokens.weight")
        if master is None:
            return
        with torch.enable_grad():
            embedded = F.embedding(run.ids, master) * self.model.embed_tokens.factor
            embedded.backward(grad.to(embedded.dtype))


def _replayed(path: str, module: nn.Module) -> nn.Module | None:
    if type(module) is Linear and module.bias is None and not bf16_products.has_bf16_gemm():
        return PortableLinear(module)
    if path.startswith("mtp."):
        return None
    if isinstance(module, Gate):
        return ReplayedGate(module)
    return HalvedLayer(module) if isinstance(module, DecoderLayer) else None


def _backward(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    given: tuple[Any, ...],
    grad: Float[Tensor, "tokens hidden"],
) -> Float[Tensor, "tokens hidden"]:
    """Recompute `module` from its input given[0] and back-propagate `grad`; returns the gradient by
    the input.
    """
    x, *rest = given
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        functional_call(module, dict(weights), (x, *rest)).backward(grad)
    assert x.grad is not None
    return x.grad
