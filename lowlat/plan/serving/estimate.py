"""Estimate of serving a model: memory of the fullest rank, decode throughput and time to first
token of a parallel layout on a cluster.

The step model is `step_cost`'s, at the rates that kernels reach. The weights and the attention of a
step are bound by memory or arithmetic each; messages do not overlap with computation.
"""

from dataclasses import dataclass

from lowlat.config.model import ModelConfig
from lowlat.config.parameter_count import FP32_BYTES
from lowlat.config.serving_layout import ServingLayout
from lowlat.engine.prefill_planner import PREFILL_CHUNK
from lowlat.plan.serving.expert_load import Balance, ExpertLoad, balance, busiest_rank
from lowlat.plan.serving.layout import check_layout, stage_layers
from lowlat.plan.serving.machines import Cluster
from lowlat.plan.serving.step_cost import (
    RankShare,
    Step,
    entry_bytes,
    step_cost,
    step_seconds,
)
from lowlat.plan.serving.traffic import Message, step_messages
from lowlat.plan.serving.weights import WeightBytes

MICRO_BATCH_TOKENS = 256
"""A step of at least twice as many tokens is divided into micro-batches, one after another through
the stages. Fewer are bound by weight bandwidth, and would read the weights again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingJob:
    """Weights, data types and load of a serving plan."""

    weights: WeightBytes
    dtype: str
    """Data type of the weights, for the rate of products."""
    users: int
    """Sequences that decode at the same time."""
    context: int
    """Tokens in the KV cache of each."""
    prompt: int
    """Tokens of the prompt whose first token is awaited."""
    cache: str = "bf16"
    """Data type of the KV cache."""
    loads: tuple[tuple[int, ...], ...] | None = None
    """Measured tokens of every expert, by layer; None: all experts are equally likely."""
    redundant_experts: int | None = None
    """Replicas per layer beyond one of each expert, placed by EPLB; None: experts in order."""
    is_data_parallel: bool = False
    """Whether the ranks of a stage have different sequences in attention (DeepSeek's own
    deployment); lowlat repeats or divides attention."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepParts:
    """Seconds of a step by what takes them."""

    weights: float = 0.0
    attention: float = 0.0
    messages: float = 0.0
    overhead: float = 0.0
    is_memory_bound: bool = True

    @property
    def total(self) -> float:
        return self.weights + self.attention + self.messages + self.overhead

    @property
    def limit(self) -> str:
        """What takes most of the time."""
        parts = {
            "weight bandwidth" if self.is_memory_bound else "products": self.weights,
            "attention": self.attention,
            "messages": self.messages,
            "layer overhead": self.overhead,
        }
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingEstimate:
    """A layout with its memory and speed."""

    layout: ServingLayout
    replicas: int
    """Copies of the model, each with its own users."""
    memory: dict[str, int | float]
    """Bytes of the fullest rank by purpose: weights, KV cache, workspace."""
    usable_bytes: int
    tokens_per_second: float
    """Decoded tokens of all users."""
    per_user: float
    """Decoded tokens per second of one user."""
    first_token: float
    """Seconds to the first token of a prompt on an idle replica."""
    decode: StepParts
    """A decode step of the slowest stage."""
    sent_bytes: float
    """Bytes that the ranks of one replica send per decoded token."""
    messages: int | float
    """Messages that they send per decode step."""
    balance: Balance | None
    """Of the measured loads of experts over the ranks of a stage."""

    @property
    def total_bytes(self) -> int | float:
        return sum(self.memory.values())

    @property
    def missing_bytes(self) -> int | float:
        """Bytes by which the fullest rank exceeds its memory; 0 if it fits."""
        return max(0.0, self.total_bytes - self.usable_bytes)

    @property
    def fits(self) -> bool:
        return self.missing_bytes == 0


def estimate(
    config: ModelConfig, job: ServingJob, cluster: Cluster, layout: ServingLayout
) -> ServingEstimate:
    """Estimate `layout`, with as many replicas as the cluster has devices for. Raises UserError for
    a layout that does not divide the model.
    """
    check_layout(config, layout)
    replicas = max(1, cluster.devices // layout.processes)
    users = -(-job.users // replicas)
    stages = stage_layers(config, layout.pipeline)
    batches = max(1, min(layout.pipeline, users // MICRO_BATCH_TOKENS))
    size = -(-users // batches)
    decode = Step(sequences=size, context=job.context)
    times = [_stage(config, job, cluster, layout, layers, decode) for layers in stages]
    slowest = max(times, key=lambda parts: parts.total)
    # the micro-batches of a step follow one another through the stages
    seconds = max(sum(parts.total for parts in times), batches * slowest.total)
    memories = [_memory(config, job, layout, layers, users) for layers in stages]
    sent, messages = _sent(config, job, cluster, layout, stages, decode)
    return ServingEstimate(
        layout=layout,
        replicas=replicas,
        memory=max(memories, key=lambda parts: sum(parts.values())),
        usable_bytes=cluster.machine.usable_bytes,
        tokens_per_second=job.users / seconds,
        per_user=1 / seconds,
        first_token=_first_token(config, job, cluster, layout, stages),
        decode=slowest,
        sent_bytes=sent / size,
        messages=messages * batches,
        balance=_balance(config, job, cluster, layout),
    )


def _balance(
    config: ModelConfig, job: ServingJob, cluster: Cluster, layout: ServingLayout
) -> Balance | None:
    """The balance of the measured loads; None without loads or with one rank."""
    if job.loads is None or config.moe is None or layout.stage_size == 1:
        return None
    ranks, redundant = layout.stage_size, job.redundant_experts or 0
    per_node = cluster.machine.devices_per_node
    nodes = 1 if ranks % per_node else ranks // per_node
    return balance(config.moe, job.loads, ranks=ranks, nodes=nodes, redundant=redundant)


def _data(layout: ServingLayout, job: ServingJob) -> int:
    """Ranks of a stage with different sequences in attention."""
    return layout.stage_size // layout.tensor if job.is_data_parallel else 1


def _stage(
    config: ModelConfig,
    job: ServingJob,
    cluster: Cluster,
    layout: ServingLayout,
    layers: range,
    step: Step,
) -> StepParts:
    """Time of a step on the busiest rank of the stage with `layers`."""
    machine, data = cluster.machine, _data(layout, job)
    load = _busiest(config, job, cluster, layout, step)
    share = RankShare(
        layers=layers,
        has_head=layers.stop == config.num_hidden_layers,
        tensor=layout.tensor,
        data=data,
        experts=load.experts,
        choices=load.choices,
    )
    cost = step_cost(config, step, job.weights, cache=job.cache, share=share)
    bound = step_seconds(cost, machine.rates(job.dtype, decodes=step.queries == 1))
    sent = _messages(config, job, cluster, layout, layers, step)
    return StepParts(
        weights=bound.weights.seconds,
        attention=bound.attention.seconds,
        messages=sum((message.seconds(machine) for message in sent), 0.0),
        overhead=len(layers) * machine.layer_seconds,
        is_memory_bound=bound.weights.is_memory_bound,
    )


def _busiest(
    config: ModelConfig, job: ServingJob, cluster: Cluster, layout: ServingLayout, step: Step
) -> ExpertLoad:
    """Experts of the busiest rank of a stage."""
    if config.moe is None:
        return ExpertLoad(experts=0.0, choices=0.0)
    imbalance = 1.0
    if found := _balance(config, job, cluster, layout):
        imbalance = found.in_order if job.redundant_experts is None else found.placed
    return busiest_rank(config.moe, step.tokens, layout.stage_size, imbalance)


def _messages(
    config: ModelConfig,
    job: ServingJob,
    cluster: Cluster,
    layout: ServingLayout,
    layers: range,
    step: Step,
) -> list[Message]:
    """What a rank of the stage with `layers` sends in a step."""
    data = _data(layout, job)
    own = step.of_rank(data)
    return step_messages(
        config,
        layout,
        cluster.machine,
        tokens=own.tokens,
        sequences=own.sequences,
        layers=layers,
        choices=_busiest(config, job, cluster, layout, step).choices,
        data=data,
    )


def _first_token(
    config: ModelConfig,
    job: ServingJob,
    cluster: Cluster,
    layout: ServingLayout,
    stages: list[range],
) -> float:
    """Seconds of a prompt: the first chunk passes all stages, the others follow."""
    seconds = 0.0
    for start in range(0, job.prompt, PREFILL_CHUNK):
        step = Step(queries=min(PREFILL_CHUNK, job.prompt - start), context=start)
        times = [_stage(config, job, cluster, layout, layers, step).total for layers in stages]
        seconds += max(times) if start else sum(times)
    return seconds


def _sent(
    config: ModelConfig,
    job: ServingJob,
    cluster: Cluster,
    layout: ServingLayout,
    stages: list[range],
    step: Step,
) -> tuple[float, int]:
    """(bytes, messages) that all ranks of a replica send in a step of one micro-batch."""
    sent, messages = 0.0, 0
    for layers in stages:
        for message in _messages(config, job, cluster, layout, layers, step):
            sent += layout.stage_size * message.sent_bytes
            messages += layout.stage_size * message.messages
    return sent, messages


def _memory(
    config: ModelConfig, job: ServingJob, layout: ServingLayout, layers: range, users: int
) -> dict[str, int | float]:
    """Bytes of a rank of the stage with `layers` by purpose."""
    weights, ranks = job.weights, layout.stage_size
    is_last = layers.stop == config.num_hidden_layers
    experts = 0.0
    if config.moe is not None:
        experts = (config.moe.n_routed_experts + (job.redundant_experts or 0)) / ranks
    share = RankShare(
        layers=layers, has_head=is_last, tensor=layout.tensor, experts=experts, choices=0.0
    )
    held = step_cost(config, Step(), weights, share=share).weight_bytes
    held += embedding_bytes(weights, layout, is_first=layers.start == 0, is_last=is_last)
    held += weights.mtp / ranks * is_last
    cached = range(layers.start, config.num_cache_layers) if is_last else layers
    entries = entry_bytes(config, job.cache, cached, layout.tensor)
    own_users = -(-users // _data(layout, job))
    cache = own_users * job.context * entries
    return {"weights": held, "KV cache": cache, "workspace": _workspace(config, own_users)}


def embedding_bytes(
    weights: WeightBytes, layout: ServingLayout, *, is_first: bool, is_last: bool
) -> int | float:
    """Bytes of the input embedding of a rank, beyond its part of the head.

    Every rank has all rows of an embedding that is the head (tied), in the first and last stage.
    """
    if weights.embedding:
        return weights.embedding * is_first
    if is_last:
        return weights.head - weights.head / layout.tensor
    return weights.head * is_first


def _workspace(config: ModelConfig, users: int) -> int:
    """Bytes of the activations of one layer for a chunk of prefill, and of logits, in fp32."""
    attention = config.attention_of(0)
    heads = config.num_attention_heads * (2 * attention.qk_head_dim + attention.v_head_dim)
    chosen = config.moe.num_experts_per_tok if config.moe else 0
    width = heads + (4 + chosen) * config.hidden_size + 2 * config.intermediate_size
    return FP32_BYTES * (PREFILL_CHUNK * width + users * config.vocab_size)
