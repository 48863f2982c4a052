"""RMSNorm and SwiGLU with fused backward passes, and activation checkpointing of decoder layers.

Fused backward passes save little and read their rows once (`ops.autograd`). A teacher and an
evaluation, which take no gradients, compute with the same modules, so that their results have the
bits of training's forward pass.
"""

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowlat.attention.base import AttentionBackend
from lowlat.model.block import DecoderLayer
from lowlat.model.linear import RMSNorm, scaled
from lowlat.model.moe import MLP
from lowlat.model.replace_modules import adopt, replace_modules
from lowlat.ops import autograd
from lowlat.ops.rope import RotaryTable


class FusedRMSNorm(RMSNorm):
    """RMSNorm that saves its input and one number per row for the backward pass."""

    def __init__(self, norm: RMSNorm) -> None:
        adopt(self, norm)

    def forward(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        return scaled(autograd.rms_norm(x, self.weight, self.eps), self.factor)


class FusedMLP(MLP):
    """SwiGLU MLP that saves the outputs of gate_proj and up_proj for the backward pass."""

    def __init__(self, mlp: MLP) -> None:
        adopt(self, mlp)

    def forward(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        return self.down_proj(autograd.swiglu(self.gate_proj(x), self.up_proj(x)))


class CheckpointedDecoderLayer(DecoderLayer):
    """Decoder layer with activation checkpointing: only its input is saved for the backward pass,
    which recomputes the rest.
    """

    def __init__(self, layer: DecoderLayer) -> None:
        adopt(self, layer)

    def forward(
        self, x: Float[Tensor, "tokens hidden"], rope: RotaryTable, attention: AttentionBackend
    ) -> Float[Tensor, "tokens hidden"]:
        return checkpoint(super().forward, x, rope, attention, use_reentrant=False)


def use_fused_layers(model: nn.Module) -> None:
    """Replace every RMSNorm and every SwiGLU MLP of `model` by its fused form."""

    def fused(_path: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, RMSNorm):
            return FusedRMSNorm(module)
        return FusedMLP(module) if isinstance(module, MLP) else None

    replace_modules(model, fused)


def checkpoint_activations(model: nn.Module) -> None:
    """Replace every decoder layer of `model`, MTP modules' included, by one with activation
    checkpointing (gradient checkpointing).
    """
    replace_modules(
        model,
        lambda _path, module: (
            CheckpointedDecoderLayer(module) if isinstance(module, DecoderLayer) else None
        ),
    )
