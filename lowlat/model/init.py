"""Weight initialisation of new models."""

import math

import torch
from torch import nn

from lowlat.model.linear import LayerNorm, Linear, RMSNorm
from lowlat.model.moe import Gate
from lowlat.model.tpa import TPA
from lowlat.model.transformer import Transformer


@torch.no_grad()
def init_weights(model: Transformer, *, seed: int) -> None:
    """Normal weights of standard deviation config.initializer_range, unit norms, zero biases (V3
    section 4.2); TPA's factor projections as in its reference code.

    Depends on `seed` only. Quantized models cannot be initialised.
    """
    assert model.config.quantization is None and model.config.packing is None
    generator = torch.Generator().manual_seed(seed)
    std = model.config.initializer_range
    factors: list[tuple[Linear, tuple[int, int]]] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            _fill(module, name, parameter, std, generator)
        if isinstance(module, TPA):
            factors += module.factor_shapes()
    for linear, shape in factors:
        _fill_factors(linear, shape, generator)


def _fill(
    module: nn.Module, name: str, parameter: nn.Parameter, std: float, generator: torch.Generator
) -> None:
    if isinstance(module, RMSNorm | LayerNorm) and name == "weight":
        parameter.fill_(1.0)
    elif name == "bias" or (isinstance(module, Gate) and name == "e_score_correction_bias"):
        parameter.zero_()
    else:
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * std
        parameter.copy_(drawn)


def _fill_factors(linear: Linear, shape: tuple[int, int], generator: torch.Generator) -> None:
    """Xavier uniform for a tensor [hidden, *shape] whose last axis counts into both fans, as in the
    code published with TPA.

    A value is a product of two factors: with the standard deviation of the other weights, values
    would be far smaller than in other attentions.
    """
    middle, last = shape
    bound = math.sqrt(6 / (last * (linear.in_features + middle)))
    drawn = torch.rand(linear.weight.shape, generator=generator, dtype=torch.float32)
    linear.weight.copy_((2 * drawn - 1) * bound)
