"""Communication of a serving step: bytes and messages that a rank sends, by kind of parallelism.

Sums of products are never divided, so that every output keeps its order of additions: tensor
parallelism divides output rows and gathers inputs, expert parallelism gathers the outputs of the
chosen experts, pipeline parallelism sends the residual stream.
"""

from dataclasses import dataclass

from lowlat.config.model import AttentionConfig, GLAConfig, MLAConfig, ModelConfig
from lowlat.config.parameter_count import FP32_BYTES
from lowlat.config.serving_layout import ServingLayout
from lowlat.plan.serving.machines import ServingMachine

ELEMENT_BYTES = 2
"""Bytes of an activation between projections (bf16)."""
FP8_BYTES = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """What a rank sends in one step for one kind of parallelism."""

    kind: str
    """tensor, expert or pipeline."""
    sent_bytes: float
    messages: int
    is_local: bool
    """Whether all ranks of the group are in one node."""

    def seconds(self, machine: ServingMachine) -> float:
        """Time of the messages, one after another."""
        if self.is_local:
            rate, latency = machine.node_bandwidth, machine.node_latency
        else:
            rate, latency = machine.network_bandwidth, machine.network_latency
        return self.messages * latency + self.sent_bytes / (rate * machine.link_share)


def step_messages(
    config: ModelConfig,
    layout: ServingLayout,
    machine: ServingMachine,
    *,
    tokens: int,
    layers: range,
    data: int = 1,
) -> list[Message]:
    """What one rank of the stage with `layers` sends in a step of `tokens` tokens. data: ranks with
    different tokens (data-parallel attention), which are sent to their experts.
    """
    found = [
        _tensor(config, layout, machine, tokens, layers),
        _expert(config, layout, machine, tokens, layers, data),
        _pipeline(config, layout, machine, tokens),
    ]
    return [message for message in found if message.messages]


def _tensor(
    config: ModelConfig,
    layout: ServingLayout,
    machine: ServingMachine,
    tokens: int,
    layers: range,
) -> Message:
    """All-gathers of the inputs of projections whose producers divided their rows."""
    others = layout.tensor - 1
    width, gathers = 0.0, 0
    for layer in layers:
        attention = config.attention_of(layer)
        inner = _inner_widths(attention)
        is_moe = config.is_moe_layer(layer)
        mlp = config.intermediate_size
        if is_moe and config.moe is not None:
            mlp = config.moe.moe_intermediate_size * config.moe.n_shared_experts
        widths = [*inner, config.hidden_size, *([mlp, config.hidden_size] if mlp else [])]
        width += sum(widths)
        gathers += len(widths)
    return Message(
        kind="tensor",
        sent_bytes=tokens * width / layout.tensor * others * ELEMENT_BYTES,
        messages=gathers * others,
        is_local=layout.tensor <= machine.devices_per_node,
    )


def _inner_widths(attention: AttentionConfig) -> list[int]:
    """Channels gathered inside attention: latents, then the heads' outputs."""
    outputs = attention.num_attention_heads * attention.v_head_dim
    if isinstance(attention, MLAConfig | GLAConfig):
        return [(attention.q_lora_rank or 0) + attention.kv_a_dim, outputs]
    return [outputs]


def _expert(
    config: ModelConfig,
    layout: ServingLayout,
    machine: ServingMachine,
    tokens: int,
    layers: range,
    data: int,
) -> Message:
    """Outputs of the chosen experts to all ranks of the stage. With data-parallel attention, tokens
    to the ranks of their experts in fp8, and the outputs back.
    """
    moe, ranks = config.moe, layout.stage_ranks
    sparse = sum(config.is_moe_layer(layer) for layer in layers)
    if moe is None or ranks == 1:
        return Message(kind="expert", sent_bytes=0.0, messages=0, is_local=True)
    rows = tokens * moe.num_experts_per_tok / ranks * config.hidden_size
    if data > 1:
        sent, rounds = rows * (FP8_BYTES + ELEMENT_BYTES) * (ranks - 1) / ranks, 2
    else:
        sent, rounds = rows * FP32_BYTES * (ranks - 1), 1
    return Message(
        kind="expert",
        sent_bytes=sparse * sent,
        # an all-to-all sends its messages at once, a gather in turn
        messages=sparse * (2 if data > 1 else rounds * (ranks - 1)),
        is_local=ranks <= machine.devices_per_node,
    )


def _pipeline(
    config: ModelConfig, layout: ServingLayout, machine: ServingMachine, tokens: int
) -> Message:
    """The residual stream to the next stage, or the sampled tokens back to the first."""
    is_local = layout.ranks <= machine.devices_per_node
    return Message(
        kind="pipeline",
        sent_bytes=tokens * config.hidden_size * FP32_BYTES * (layout.pipeline > 1),
        messages=int(layout.pipeline > 1),
        is_local=is_local,
    )
