"""Sparse upcycling: a dense model as a mixture of experts that computes the same function.

arXiv:2212.05055, with a shared expert as in DeepSeekMoE (arXiv:2401.06066). Half of a layer's inner
channels become the shared expert; every routed expert is a copy of the other half. The routing
weights of the selected experts sum to one, so every selection gives the dense layer's output. The
copies diverge in training.
"""

import re
import zlib
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from lowlat.checkpoint.mapping import ROUTER_BIAS
from lowlat.config.hf.families import LOWLAT
from lowlat.config.model import MLAConfig, ModelConfig, MoEConfig
from lowlat.convert.parameters.weights import Weights, parameter_shapes
from lowlat.utils.errors import UserError

EXPERTS_PER_TOKEN = 2
"""Active routed experts. With one, its routing weight would be 1 and the router would get no
gradient.
"""
MAX_EXPERTS = 1024
"""Maximum routed experts of a layer; released models have at most 384."""
EXPERTS = re.compile(r"(?P<mlp>.+\.mlp)\.(?:shared_experts|experts\.\d+)\.(?P<matrix>\w+)\.weight")
ROUTER = ".mlp.gate.weight"


def upcycled_config(config: ModelConfig, experts: int) -> ModelConfig:
    """`config` of a dense MLA model, with `experts` routed experts and a shared expert in every
    layer.

    Raises UserError for models that cannot be upcycled.
    """
    if config.moe is not None:
        raise UserError(
            f"--experts makes experts of a dense model, and this one has "
            f"{config.moe.n_routed_experts} already"
        )
    if not isinstance(config.attention_of(0), MLAConfig):
        raise UserError("--experts makes a model of the deepseek_v3 kind; add --to mla")
    if config.model_type not in ("deepseek_v3", LOWLAT):
        raise UserError(
            f"--experts makes a model of the deepseek_v3 kind, and '{config.model_type}' routes "
            "by other rules"
        )
    if not EXPERTS_PER_TOKEN < experts <= MAX_EXPERTS:
        raise UserError(
            f"--experts {experts} is out of range: {EXPERTS_PER_TOKEN} are active per token; give "
            f"{EXPERTS_PER_TOKEN + 1} to {MAX_EXPERTS}"
        )
    if config.intermediate_size % 2:
        raise UserError(
            f"--experts halves the inner width of layers, and intermediate_size "
            f"{config.intermediate_size} is odd"
        )
    moe = MoEConfig(
        n_routed_experts=experts,
        num_experts_per_tok=EXPERTS_PER_TOKEN,
        n_shared_experts=1,
        moe_intermediate_size=config.intermediate_size // 2,
        first_k_dense_replace=0,
    )
    return replace(config, moe=moe)


@final
class UpcycledWeights(Weights):
    """The parameters of the dense model `base` with experts. Routers are normally distributed with
    the config's initializer_range, from a fixed seed.
    """

    def __init__(self, base: Weights, experts: int) -> None:
        self._base = base
        self.config = upcycled_config(base.config, experts)
        self._shapes = parameter_shapes(self.config)
        self._half = base.config.intermediate_size // 2

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name.endswith(ROUTER_BIAS) else self._base.dtype(_dense(name))

    def read(self, name: str) -> Tensor:
        return self.rows(name, 0, self._shapes[name][0])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name.endswith(ROUTER_BIAS):
            return torch.zeros(stop - start)
        if name.endswith(ROUTER):
            return self._router(name)[start:stop]
        dense = _dense(name)
        if dense == name:
            return self._base.rows(name, start, stop)
        first = 0 if ".shared_experts." in name else self._half
        if name.endswith("down_proj.weight"):
            return self._base.rows(dense, start, stop)[:, first : first + self._half]
        return self._base.rows(dense, first + start, first + stop)

    def release(self, name: str) -> None:
        self._base.release(_dense(name))

    def where(self, name: str) -> str:
        return self._base.where(_dense(name))

    def _router(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        drawn = torch.randn(self._shapes[name], generator=generator)
        return (drawn * self.config.initializer_range).to(self.dtype(name))


def _dense(name: str) -> str:
    """The dense parameter that `name` is derived from; gate_proj for routers, for its dtype."""
    if match := EXPERTS.fullmatch(name):
        return f"{match['mlp']}.{match['matrix']}.weight"
    if name.endswith((ROUTER, ROUTER_BIAS)):
        return f"{name.partition('.mlp.')[0]}.mlp.gate_proj.weight"
    return name
