"""Random models in every storage the kernels know."""

from dataclasses import replace

import torch

from lowlat.config.model import ModelConfig, QuantConfig
from lowlat.model.linear import Linear
from lowlat.model.transformer import Transformer
from lowlat.ops.fp8 import quantize_blocks
from tests.native.test_step import packed_and_plain, random_model

STORAGES = ("bf16", "fp8", "int8", "int4")


def stored_model(config: ModelConfig, seed: int, storage: str) -> Transformer:
    """`random_model` with its projections stored as `storage`."""
    if storage == "bf16":
        return random_model(config, seed)
    if storage != "fp8":
        return packed_and_plain(config, seed, storage)[0]
    drawn = random_model(config, seed)
    model = Transformer(replace(config, quantization=QuantConfig()), dtype=torch.bfloat16)
    model.load_state_dict(fp8_state(model, drawn))
    return model


def fp8_state(model: Transformer, drawn: Transformer) -> dict[str, torch.Tensor]:
    """The parameters of `model`, whose projections are fp8, from those of `drawn`."""
    state = drawn.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, Linear) and module.storage == "fp8":
            assert module.block is not None
            weight, scale = quantize_blocks(state[f"{name}.weight"].float(), module.block)
            state |= {f"{name}.weight": weight, f"{name}.weight_scale_inv": scale}
    return state
