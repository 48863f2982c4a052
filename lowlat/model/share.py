"""Model share: the part of a model that one process holds when several processes serve it (pipeline
parallelism: consecutive layers; tensor and expert parallelism: parts of each layer).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lowlat.config.model import ModelConfig
from lowlat.ops.expert_placement import rebalance_experts


class RemoteModule(nn.Module):
    """Placeholder for a module of another process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShare:
    """Consecutive decoder layers or parts of them, with embedding or head at the ends."""

    layers: range
    is_first: bool
    """Whether it begins with the embedding."""
    is_last: bool
    """Whether it ends with final norm, head and MTP modules."""
    tensor: int = 1
    """Processes that divide attention heads and rows of dense layers (tensor parallelism)."""
    tensor_rank: int = 0
    experts: int = 1
    """Processes that divide the routed experts (expert parallelism)."""
    expert_rank: int = 0
    redundant_experts: int = 0
    """Replicas of routed experts per layer, beyond one of each."""

    @classmethod
    def whole(cls, config: ModelConfig) -> "ModelShare":
        """All of a model."""
        return cls(layers=range(config.num_hidden_layers), is_first=True, is_last=True)

    @property
    def is_divided(self) -> bool:
        """Whether other processes compute parts of the same layers."""
        return self.tensor > 1 or self.experts > 1

    def expert_places(self, count: int) -> list[int]:
        """The expert of every place before loads are known, of `count` routed experts: in order,
        with replicas if all are equally loaded."""
        if not self.redundant_experts:
            return list(range(count))
        return place_experts(torch.ones(1, count), self, groups=1)[0]

    def uses_embedding(self, config: ModelConfig, *, is_head: bool) -> bool:
        """Whether it reads the embedding matrix: for tokens, for MTP modules, or as the head."""
        ahead = config.num_nextn_predict_layers > 0 and not config.mtp_copies
        return self.is_first or (self.is_last and (is_head or ahead))

    def cache_layers(self, config: ModelConfig) -> tuple[int, ...]:
        """Layers with KV cache entries: MTP modules are numbered after the decoder layers."""
        ahead = range(config.num_hidden_layers, config.num_cache_layers)
        return (*self.layers, *ahead) if self.is_last else tuple(self.layers)


def place_experts(
    loads: Float[Tensor, "layers experts"] | Int[Tensor, "layers experts"],
    share: ModelShare,
    *,
    groups: int,
) -> list[list[int]]:
    """The expert of every place by layer, by EPLB for `loads`; a process's places ascend."""
    replicas = loads.shape[1] + share.redundant_experts
    placed = rebalance_experts(loads, replicas, groups, 1, share.experts)[0]
    return placed.unflatten(1, (share.experts, -1)).sort(dim=2).values.flatten(1).tolist()
