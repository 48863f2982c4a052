"""Initial weights: all of the package's initialisation is here."""

import torch
from torch import nn

from lowlat.model.linear import RMSNorm
from lowlat.model.moe import Gate
from lowlat.model.transformer import Transformer


@torch.no_grad()
def init_weights(model: Transformer, *, seed: int) -> None:
    """Normal weights of standard deviation config.initializer_range, unit norms, zero biases (V3
    section 4.2).

    Deterministic in `seed` and in nothing else; quantised models cannot be initialised.
    """
    assert model.config.quantization is None
    generator = torch.Generator().manual_seed(seed)
    std = model.config.initializer_range
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            _fill(module, name, parameter, std, generator)


def _fill(
    module: nn.Module, name: str, parameter: nn.Parameter, std: float, generator: torch.Generator
) -> None:
    if isinstance(module, RMSNorm):
        parameter.fill_(1.0)
    elif name == "bias" or (isinstance(module, Gate) and name == "e_score_correction_bias"):
        parameter.zero_()
    else:
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * std
        parameter.copy_(drawn)
