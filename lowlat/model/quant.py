"""Storage formats of the projections of quantized models: fp8 blocks, int8, int4, GGUF blocks."""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn

from lowlat.config.model import ModelConfig, Packing, QuantConfig
from lowlat.model.linear import Embedding, Linear, Storage
from lowlat.ops.gguf_blocks import type_name

PLAIN = ("lm_head", "head", "eh_proj")
"""Projections that released fp8 checkpoints keep in bf16, as they do embedding, norms and gate."""

PACKED: Mapping[Packing, Mapping[str, Storage]] = {
    "int8": {"kv_b_proj": "int8_rows"},
    "int4": {"kv_b_proj": "int8_rows", "lm_head": "int8", "head": "int8", "eh_proj": "int8"},
}
"""Format of a packed model -> projections in another format. Embedding, norms and gate are
plain.
"""


def store_quantized(model: nn.Module, quant: QuantConfig, *, num_hidden_layers: int) -> None:
    """Give the projections of a new model fp8 blocks, except those that stay plain."""
    for name, module in model.named_modules():
        if isinstance(module, Linear) and not _is_plain(name, quant, num_hidden_layers):
            module.store_fp8(quant)


def store_configured(model: nn.Module, config: ModelConfig) -> None:
    """Give the projections of a new model, or of parts of it, the storage of its config."""
    if config.quantization is not None:
        store_quantized(model, config.quantization, num_hidden_layers=config.num_hidden_layers)
    if config.packing is not None:
        store_packed(model, config.packing)


def store_packed(model: nn.Module, packing: Packing) -> dict[str, Linear]:
    """Give all projections of a new model int8 or int4 weights, with the exceptions in
    `PACKED[packing]`.

    Returns them by the name of their weight.
    """
    result: dict[str, Linear] = {}
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            module.store_packed(PACKED[packing].get(path.rpartition(".")[2], packing))
            result[f"{path}.weight"] = module
    return result


def packed_type(model: nn.Module) -> Packing | None:
    """The format `store_packed` gave `model`; None for a model that is not packed."""
    storages = {module.storage for module in model.modules() if isinstance(module, Linear)}
    return "int4" if "int4" in storages else "int8" if "int8" in storages else None


def weight_format(model: nn.Module, plain: torch.dtype) -> str:
    """How most weights of `model` are stored: int8, int4, fp8, the names of up to two GGUF types,
    or `plain`.
    """
    sizes: Counter[int] = Counter()
    for module in model.modules():
        if isinstance(module, Linear | Embedding) and module.gguf_type is not None:
            sizes[module.gguf_type] += module.weight.nbytes
    if sizes:
        names = dict.fromkeys(type_name(kind) for kind, _ in sizes.most_common())
        return " and ".join(list(names)[:2])
    if any(isinstance(one, Linear) and one.storage == "fp8_rows" for one in model.modules()):
        return "fp8"
    return packed_type(model) or str(plain).removeprefix("torch.")


def _is_plain(name: str, quant: QuantConfig, num_hidden_layers: int) -> bool:
    """Whether the projection `name` is plain in every checkpoint, or listed by config.json in
    modules_to_not_convert.
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
