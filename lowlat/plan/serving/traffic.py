"""Communication of a serving step: bytes and messages that a rank sends, by kind of parallelism.

No partial sums are added, so that every output keeps its order of additions: tensor parallelism
divides output rows and gathers the inputs and outputs of output projections and MLPs, expert
parallelism gathers the outputs of the chosen experts, pipeline parallelism sends the residual
stream.
"""

from dataclasses import dataclass

from lowlat.config.model import ModelConfig
from lowlat.config.parameter_count import FP32_BYTES
from lowlat.config.serving_layout import ServingLayout
from lowlat.plan.serving.layout import stage_layers
from lowlat.plan.serving.machines import ServingMachine

ELEMENT_BYTES = 2
"""Bytes of an activation between projections (bf16)."""
FP8_BYTES = 1
RECORD_BYTES, RECORD_INTEGERS, INTEGER_BYTES = 4096, 511, 8
"""First message of a step record, which rank 0 sends to every other rank, and the integers in it;
others follow in a second message."""


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
    sequences: int = 1,
    layers: range,
    choices: int | float = 0.0,
    data: int = 1,
) -> list[Message]:
    """What one rank of the stage with `layers` sends in a step in which it has `tokens` tokens of
    `sequences` sequences. choices: tokens times routed experts of the busiest rank per layer, to
    which the others pad their outputs. data: ranks with different tokens (data-parallel attention),
    which are sent to their experts.
    """
    is_last = layers.stop == config.num_hidden_layers
    found = [
        _tensor(config, layout, machine, tokens, layers, sequences if is_last else 0),
        _expert(config, layout, machine, choices, layers, data),
        _pipeline(config, layout, machine, tokens, sequences if is_last else None),
    ]
    return [message for message in found if message.messages]


def rank_traffic(
    config: ModelConfig,
    layout: ServingLayout,
    rank: int,
    *,
    tokens: int,
    logits: int = 1,
    choices: int | float = 0.0,
    record: int = 0,
) -> tuple[float, int]:
    """(bytes, messages) that process `rank` of `layout` sends in a step of `tokens` tokens with
    `logits` rows of logits. choices: as in `step_messages`. record: integers of the step record.
    """
    stage, own = divmod(rank, layout.stage_size)
    layers = stage_layers(config, layout.pipeline)[stage]
    is_last = stage == layout.pipeline - 1
    sent, messages = _tensor_traffic(config, layout, tokens, layers, logits if is_last else 0)
    routed, gathers = _expert_traffic(config, layout, choices, layers, 1)
    sent, messages = sent + routed, messages + gathers
    if rank == 0:
        others, rest = layout.processes - 1, max(0, record - RECORD_INTEGERS)
        sent += others * (RECORD_BYTES + rest * INTEGER_BYTES)
        messages += others * (1 + (rest > 0))
    rows = tokens * config.hidden_size * ELEMENT_BYTES
    if not is_last:
        return sent + rows, messages + 1
    if layout.pipeline > 1 and own == 0:
        sent += rows + logits * config.vocab_size * FP32_BYTES
        messages += 1 + (logits > 0)
    return sent, messages


def _tensor(
    config: ModelConfig,
    layout: ServingLayout,
    machine: ServingMachine,
    tokens: int,
    layers: range,
    logits: int,
) -> Message:
    sent, messages = _tensor_traffic(config, layout, tokens, layers, logits)
    is_local = layout.tensor <= machine.devices_per_node
    return Message(kind="tensor", sent_bytes=sent, messages=messages, is_local=is_local)


def _tensor_traffic(
    config: ModelConfig, layout: ServingLayout, tokens: int, layers: range, logits: int
) -> tuple[float, int]:
    """(bytes, messages) of a rank: all-gathers of the heads' outputs, of MLPs' inner channels and
    of both projections' outputs, and of `logits` rows of logits."""
    others = layout.tensor - 1
    width, gathers = 0, 0
    if config.tie_word_embeddings or config.vocab_size % layout.tensor:
        logits = 0  # such a head is not divided
    for layer in layers:
        attention = config.attention_of(layer)
        inner = config.intermediate_size
        if config.moe is not None and config.is_moe_layer(layer):
            inner = config.moe.moe_intermediate_size * config.moe.n_shared_experts
        outputs = attention.num_attention_heads * attention.v_head_dim
        widths = [outputs, config.hidden_size, *([inner, config.hidden_size] if inner else [])]
        width += sum(widths)
        gathers += len(widths)
    own = tokens * width * ELEMENT_BYTES + logits * config.vocab_size * FP32_BYTES
    return own / layout.tensor * others, (gathers + (logits > 0)) * others


def _expert(
    config: ModelConfig,
    layout: ServingLayout,
    machine: ServingMachine,
    choices: int | float,
    layers: range,
    data: int,
) -> Message:
    sent, messages = _expert_traffic(config, layout, choices, layers, data)
    is_local = layout.stage_size <= machine.devices_per_node
    return Message(kind="expert", sent_bytes=sent, messages=messages, is_local=is_local)


def _expert_traffic(
    config: ModelConfig, layout: ServingLayout, choices: int | float, layers: range, data: int
) -> tuple[float, int]:
    """(bytes, messages) of a rank: outputs of the chosen experts to all ranks of the stage. With
    data-parallel attention, tokens to the ranks of their experts in fp8, and the outputs back.
    """
    ranks = layout.stage_size
    sparse = sum(config.is_moe_layer(layer) for layer in layers)
    rows = choices * config.hidden_size * (ranks - 1)
    if data > 1:
        # each row goes to one rank; an all-to-all sends its messages at once
        sent, messages = rows * (FP8_BYTES + ELEMENT_BYTES) / ranks, 2
    else:
        sent, messages = rows * ELEMENT_BYTES, ranks - 1
    return sparse * sent, sparse * messages if ranks > 1 else 0


def _pipeline(
    config: ModelConfig,
    layout: ServingLayout,
    machine: ServingMachine,
    tokens: int,
    logits: int | None,
) -> Message:
    """The residual stream to the next stage; from the last stage, which has `logits` rows of them,
    also these to the first."""
    is_used = layout.pipeline > 1
    sent = tokens * config.hidden_size * ELEMENT_BYTES
    sent += (logits or 0) * config.vocab_size * FP32_BYTES
    return Message(
        kind="pipeline",
        sent_bytes=float(sent * is_used),
        messages=is_used * (1 if logits is None else 2),
        is_local=layout.processes <= machine.devices_per_node,
    )
