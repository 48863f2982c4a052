"""Which projections are stored how: fp8 blocks of checkpoints, int8 and int4 packed."""

from collections.abc import Mapping

from torch import nn

from lowlat.config.model import Packing, QuantConfig
from lowlat.model.linear import Linear, Storage

PLAIN = ("lm_head", "head", "eh_proj")
"""Projections every released fp8 checkpoint keeps in bf16, beside embedding, norms and gate."""

PACKED: Mapping[Packing, Mapping[str, Storage]] = {
    "int8": {"kv_b_proj": "int8_rows"},
    "int4": {"kv_b_proj": "int8_rows", "lm_head": "int8", "head": "int8", "eh_proj": "int8"},
}
"""Number type of a packed model -> projections stored otherwise. Embedding, norms and gate are
plain.
"""


def store_quantized(model: nn.Module, quant: QuantConfig, *, num_hidden_layers: int) -> None:
    """Turn the projections of a freshly built model into fp8 blocks, except those kept plain."""
    for name, module in model.named_modules():
        if isinstance(module, Linear) and not _is_plain(name, quant, num_hidden_layers):
            module.store_fp8(quant)


def store_packed(model: nn.Module, packing: Packing) -> dict[str, Linear]:
    """Turn all projections of a freshly built model into int8 or int4, as `PACKED[packing]` says.

    Returns them by the name of their weight.
    """
    result: dict[str, Linear] = {}
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            storage = PACKED[packing].get(path.rpartition(".")[2], packing)
            if storage == "int4":
                module.store_int4()
            elif storage == "int8":
                module.store_int8()
            else:
                module.store_int8_rows()
            result[f"{path}.weight"] = module
    return result


def packed_type(model: nn.Module) -> Packing | None:
    """What `store_packed` was given for `model`; None for a model it never saw."""
    storages = {module.storage for module in model.modules() if isinstance(module, Linear)}
    return "int4" if "int4" in storages else "int8" if "int8" in storages else None


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
