"""Placement of redundant experts on devices (EPLB, DeepSeek's expert parallelism load balancer,
deepseek-ai/EPLB): which experts get replicas, and which device holds each.

Hierarchical placement keeps the experts of a group in one node, as group-limited routing sends a
token to few groups: groups are packed onto nodes, the most loaded experts of a node are replicated,
and the replicas are packed onto its devices. Every packing is greedy: the heaviest item first, to
the lightest pack with room.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lowlat.utils.errors import UserError


def rebalance_experts(
    weight: Float[Tensor, "layers experts"] | Int[Tensor, "layers experts"],
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
) -> tuple[
    Int[Tensor, "layers replicas"],
    Int[Tensor, "layers experts most"],
    Int[Tensor, "layers experts"],
]:
    """Place `num_replicas` replicas of experts with loads `weight` on `num_gpus` devices.

    Hierarchical if the nodes divide the groups, else global. Returns phy2log, the expert of each
    replica (consecutive replicas share a device); log2phy, the replicas of each expert, filled with
    -1; and logcnt, their number. Raises UserError for numbers that do not divide.
    """
    layers, experts = weight.shape
    if not layers:
        raise UserError("placement of experts: no layer has loads")
    is_hierarchical = num_groups % num_nodes == 0
    groups, nodes = (num_groups, num_nodes) if is_hierarchical else (1, 1)
    _check(experts, num_replicas, groups, nodes, num_gpus)
    placed = [_place(row.float(), num_replicas, groups, nodes, num_gpus) for row in weight.cpu()]
    phy2log = torch.tensor([[expert for expert, _ in replicas] for replicas in placed])
    logcnt = torch.zeros(layers, experts, dtype=torch.int64)
    logcnt.scatter_add_(1, phy2log, torch.ones_like(phy2log))
    log2phy = torch.full((layers, experts, int(logcnt.max())), -1)
    for layer, replicas in enumerate(placed):
        for place, (expert, rank) in enumerate(replicas):
            log2phy[layer, expert, rank] = place
    return phy2log, log2phy, logcnt


def imbalance(
    weight: Float[Tensor, "layers experts"],
    phy2log: Int[Tensor, "layers replicas"],
    num_gpus: int,
) -> Float[Tensor, " layers"]:
    """Load of the busiest device over the mean, per layer, if an expert's tokens are divided
    equally among its replicas."""
    loads = weight.double()
    counts = torch.zeros_like(loads).scatter_add_(
        1, phy2log, torch.ones(phy2log.shape, dtype=loads.dtype)
    )
    replicas = (loads / counts).gather(1, phy2log)
    devices = replicas.unflatten(1, (num_gpus, -1)).sum(dim=2)
    mean = devices.mean(dim=1)
    return torch.where(mean > 0, devices.amax(dim=1) / mean, 1.0)


def _check(experts: int, replicas: int, groups: int, nodes: int, devices: int) -> None:
    problems = (
        (replicas < experts, f"{replicas} replicas are fewer than the {experts} experts"),
        (experts % groups, f"{groups} groups do not divide the {experts} experts"),
        (devices % nodes, f"{nodes} nodes do not divide the {devices} devices"),
        (replicas % devices, f"{devices} devices do not divide the {replicas} replicas"),
    )
    for is_wrong, message in problems:
        if is_wrong:
            raise UserError(f"placement of experts: {message}")


def _place(
    loads: Float[Tensor, " experts"], replicas: int, groups: int, nodes: int, devices: int
) -> list[tuple[int, int]]:
    """(expert, number among the expert's replicas) of each replica of one layer, device by
    device."""
    size = len(loads) // groups
    result: list[tuple[int, int]] = []
    for own_groups in _pack(loads.unflatten(0, (groups, size)).sum(dim=1), nodes):
        experts = [group * size + place for group in own_groups for place in range(size)]
        owners, ranks = _replicate(loads[experts], replicas // nodes)
        shares = (loads[experts] / torch.bincount(owners))[owners]
        for device in _pack(shares, devices // nodes):
            result += [(experts[int(owners[place])], ranks[place]) for place in device]
    return result


def _pack(weights: Float[Tensor, " items"], packs: int) -> list[list[int]]:
    """Equally many items for each pack, with balanced sums of weights."""
    capacity = len(weights) // packs
    if capacity == 1:
        return [[item] for item in range(packs)]
    found: list[list[int]] = [[] for _ in range(packs)]
    sums = [0.0] * packs
    order = weights.sort(descending=True, stable=True).indices
    for item, weight in zip(order.tolist(), weights[order].tolist(), strict=True):
        free = (pack for pack in range(packs) if len(found[pack]) < capacity)
        pack = min(free, key=lambda pack: sums[pack])
        found[pack].append(item)
        sums[pack] += weight
    return found


def _replicate(
    loads: Float[Tensor, " experts"], replicas: int
) -> tuple[Int[Tensor, " replicas"], list[int]]:
    """(expert, number among the expert's replicas) of each replica: every expert once, then always
    the one with the largest load per replica."""
    owners, ranks = list(range(len(loads))), [0] * len(loads)
    counts = torch.ones_like(loads)
    while len(owners) < replicas:
        busiest = int((loads / counts).argmax())
        owners.append(busiest)
        ranks.append(int(counts[busiest]))
        counts[busiest] += 1
    return torch.tensor(owners), ranks
