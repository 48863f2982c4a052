"""Which projections a quantised checkpoint stores as fp8 blocks."""

from torch import nn

from lowlat.config.model import QuantConfig
from lowlat.model.linear import Linear
from lowlat.model.moe import Experts

PLAIN = ("lm_head", "head", "eh_proj")
"""Projections every released fp8 checkpoint keeps in bf16, beside embedding, norms and gate."""


def store_quantized(model: nn.Module, quant: QuantConfig, *, num_hidden_layers: int) -> None:
    """Turn the projections of a freshly built model into fp8 blocks, except those kept plain."""
    for name, module in model.named_modules():
        if isinstance(module, Linear | Experts) and not _is_plain(name, quant, num_hidden_layers):
            module.store_fp8(quant)


def _is_plain(name: str, quant: QuantConfig, num_hidden_layers: int) -> bool:
    """Whether `name` is plain by custom or lies at or below a module that config.json lists as not
    converted.
    """
    parts = name.split(".")
    if parts[-1] in PLAIN:
        return True
    if parts[0] == "mtp":
        # mtp.K.block.X is layers.{num_hidden_layers + K}.X in files.
        parts = ["layers", str(num_hidden_layers + int(parts[1])), *parts[3:]]
    dotted = f".{'.'.join(parts)}."
    return any(
        f".{kept.removeprefix('model.')}." in dotted for kept in quant.modules_to_not_convert
    )
