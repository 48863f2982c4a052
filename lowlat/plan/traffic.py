"""Communication volume: bytes a device sends per step, by kind and link, and overlap.

Ranks are ordered tensor (innermost), fsdp, context, data, pipeline. Collectives that span nodes
are hierarchical: they send within the node first, so each device's network link carries only its
share. `estimate` turns volumes into time.
"""

import math
from dataclasses import KW_ONLY, dataclass

from lowlat.config.model import ModelConfig
from lowlat.plan.activations import FP8_BYTES, FP32_BYTES
from lowlat.plan.job import TrainingJob
from lowlat.plan.machine import Machine
from lowlat.plan.memory import cast_bytes, shares
from lowlat.plan.stages import ROUTED, PipelineStage, device_parameters

DISPATCH, COMBINE = "expert dispatch", "expert combine"


@dataclass(frozen=True, slots=True)
class Transfer:
    """Bytes that a device sends for one kind of communication."""

    kind: str
    """Name of the communication."""
    node_bytes: float
    """Bytes per step within the node."""
    network_bytes: float
    """Bytes per step to other nodes."""
    _: KW_ONLY
    forward_share: float = 0.5
    """Share in forward passes."""
    is_per_step: bool = False
    """Whether it happens once per step instead of once per micro-batch."""
    is_hidden: bool = False
    """Whether it overlaps with computation of other layers, as far as that takes long enough."""


def transfers(
    config: ModelConfig, job: TrainingJob, machine: Machine, stages: list[PipelineStage]
) -> list[Transfer]:
    """All transfers of a device that holds `stages`."""
    found = [
        *_experts(config, job, machine, stages),
        _tensor(config, job, stages),
        _context(config, job, machine, stages),
        _pipeline(config, job, machine),
        *_replicas(config, job, machine, stages),
    ]
    return [transfer for transfer in found if transfer.node_bytes + transfer.network_bytes]


def places(config: ModelConfig, spread: int) -> float:
    """Expected number of nodes or devices that a token is dispatched to, if `spread` of them share
    a layer's experts equally and all groups and experts are equally likely.
    """
    moe = config.moe
    assert moe is not None
    chosen, groups, used = moe.num_experts_per_tok, moe.n_group, moe.topk_group
    size = moe.n_routed_experts // groups
    open_experts = used * size

    def missed(own: int | float) -> float:
        """Probability that none of `own` open experts is chosen."""
        own = min(round(own), open_experts)
        return math.comb(open_experts - own, chosen) / math.comb(open_experts, chosen)

    if spread >= groups:
        hit = used / groups * (1 - missed(moe.n_routed_experts / spread))
    else:
        own = groups // spread
        hit = sum(
            math.comb(own, open_own)
            * math.comb(groups - own, used - open_own)
            / math.comb(groups, used)
            * (1 - missed(open_own * size))
            for open_own in range(max(0, used - groups + own), min(own, used) + 1)
        )
    return spread * hit


def _experts(
    config: ModelConfig, job: TrainingJob, machine: Machine, stages: list[PipelineStage]
) -> list[Transfer]:
    """Expert all-to-all: a token is sent once to every node with one of its experts, and within the
    node to every device with one (DeepSeek-V3 section 3.2.2); combine takes the same way back.
    """
    layout = job.layout
    if config.moe is None or layout.expert == 1:
        return []
    nodes = max(1, min(layout.expert, layout.expert * layout.tensor // machine.devices_per_node))
    devices = places(config, layout.expert)
    other_nodes = places(config, nodes) * (nodes - 1) / nodes
    other_devices = devices * (1 - nodes / layout.expert)
    layers = sum(stage.moe_layers(config) for stage in stages) / layout.copies
    tokens = job.device_tokens * job.micro_batches * layers * config.hidden_size
    wide = float(job.element_bytes)
    narrow = FP8_BYTES if job.precision == "fp8" else wide
    # Backward: the gradient of combine is dispatched, that of dispatch combined.
    passes = 3 if job.activation_checkpointing == "full" else 2
    return [
        Transfer(
            kind=kind,
            # Every tensor-parallel device of an expert needs the tokens.
            node_bytes=passes * tokens * size * other_devices * layout.tensor,
            network_bytes=passes * tokens * size * other_nodes,
            forward_share=1 / passes,
        )
        for kind, size in ((DISPATCH, narrow), (COMBINE, wide))
    ]


def _tensor(config: ModelConfig, job: TrainingJob, stages: list[PipelineStage]) -> Transfer:
    """Tensor parallelism: four all-gathers or reduce-scatters per layer and direction."""
    layout = job.layout
    layers = sum(len(stage.all_layers(config)) for stage in stages) / layout.copies
    # Each device receives the tokens of the other tensor-parallel devices.
    rows = job.device_tokens * (layout.tensor - 1) * job.micro_batches
    return Transfer(
        kind="tensor parallel",
        node_bytes=2 * 4 * layers * rows * config.hidden_size * job.element_bytes,
        network_bytes=0.0,
    )


def _context(
    config: ModelConfig, job: TrainingJob, machine: Machine, stages: list[PipelineStage]
) -> Transfer:
    """Context parallelism: keys and values (MLA: latents) are sent around a ring, and in the
    backward pass again with their gradients.
    """
    layout = job.layout
    elements = sum(
        config.attention_of(layer).entry_dim
        for stage in stages
        for layer in stage.all_layers(config)
    )
    rows = job.device_tokens * (layout.context - 1) * job.micro_batches
    sent = 3 * rows * elements / layout.copies * job.element_bytes
    is_local = layout.context * layout.fsdp * layout.tensor <= machine.devices_per_node
    volume = _on_link(sent, is_local)
    return Transfer("context parallel", *volume, forward_share=1 / 3, is_hidden=True)


def _pipeline(config: ModelConfig, job: TrainingJob, machine: Machine) -> Transfer:
    """Pipeline: activations to the next stage, their gradients to the previous stage."""
    layout = job.layout
    crossings = layout.num_stages // layout.pipeline if layout.pipeline > 1 else 0
    rows = job.device_tokens * job.micro_batches * crossings
    sent = 2 * rows * config.hidden_size * job.element_bytes
    is_local = layout.devices <= machine.devices_per_node
    return Transfer("pipeline", *_on_link(sent, is_local), is_hidden=True)


def _on_link(sent: float, is_local: bool) -> tuple[float, float]:
    """(within the node, over the network) bytes of what takes one link only."""
    return (sent, 0.0) if is_local else (0.0, sent)


def _replicas(
    config: ModelConfig, job: TrainingJob, machine: Machine, stages: list[PipelineStage]
) -> list[Transfer]:
    """Data parallelism: reduce-scatter of gradients and all-gather of weights among replicas that
    shard state (ZeRO, arXiv 1910.02054 section 7); all-reduce of gradients over their groups.
    """
    layout, passes = job.layout, job.micro_batches
    once, gathers, scatters = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]
    for part, count in device_parameters(config, stages, layout).items():
        replicas, shared = shares(layout, part)
        if layout.zero == 0:
            shared = 1
        outer = replicas // shared
        stride = layout.tensor * (layout.expert if layout.expert > 1 and part == ROUTED else 1)
        gather = count * (cast_bytes(job, part) or FP32_BYTES) * (1 - 1 / shared)
        scatter = count * FP32_BYTES * (1 - 1 / shared)
        sums = 2 * count / shared * FP32_BYTES * (1 - 1 / outer)
        per_step = (gather if layout.zero < 3 else 0.0) + (scatter if layout.zero == 1 else 0.0)
        inner = shared, stride
        for total, sent, ranks in (
            (once, per_step, inner),
            (once, sums, (outer, stride * shared)),
            (gathers, gather * 2 * passes if layout.zero == 3 else 0.0, inner),
            (scatters, scatter * passes if layout.zero >= 2 else 0.0, inner),
        ):
            local, remote = _split(sent, *ranks, machine)
            total[0] += local
            total[1] += remote
    return [
        Transfer("gradients and weights", *once, is_per_step=True),
        Transfer("gathered weights", *gathers, is_hidden=True),
        Transfer("scattered gradients", *scatters, forward_share=0.0, is_hidden=True),
    ]


def _split(sent: float, count: int, stride: int, machine: Machine) -> tuple[float, float]:
    """(within the node, over the network) bytes of a collective of `count` ranks `stride` apart."""
    local = max(1, min(count, machine.devices_per_node // stride))
    if count <= local:
        return sent, 0.0
    return (sent if local > 1 else 0.0), sent / local
