"""Pipeline stages of the cost model: balanced division of layers among devices, and the parameters
of each device.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

from lowlat.config.attention import GLAConfig, MLAConfig
from lowlat.config.model import ModelConfig
from lowlat.config.parameter_count import (
    attention_parameters,
    expert_parameters,
    gate_parameters,
    mlp_parameters,
)
from lowlat.plan.flops import ForwardFlops, head_flops, layer_work, mtp_work
from lowlat.plan.job import BIDIRECTIONAL, ParallelLayout

ROUTED = "routed experts"


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineStage:
    """Consecutive layers of a pipeline stage, with the embedding or the head at the ends."""

    index: int
    """Index in the pipeline, from 0."""
    layers: tuple[int, ...]
    """Decoder layers."""
    is_first: bool
    """Whether it has the embedding."""
    is_last: bool
    """Whether it has final norm, head and MTP modules, which also need the embedding."""

    def moe_layers(self, config: ModelConfig) -> int:
        """Layers with routed experts, MTP modules' included."""
        return sum(config.is_moe_layer(layer) for layer in self.all_layers(config))

    def all_layers(self, config: ModelConfig) -> tuple[int, ...]:
        """Decoder layers and, on the last stage, those of MTP modules."""
        ahead = range(config.num_hidden_layers, config.num_cache_layers)
        return (*self.layers, *ahead) if self.is_last else self.layers


def cut(
    config: ModelConfig,
    layout: ParallelLayout,
    costs: tuple[float, ...],
    most_units: int | None = None,
) -> list[PipelineStage]:
    """The stages in order, so that the busiest device is as little busy as it can be, with at most
    `most_units` of the config's `layer_units` per stage.

    costs: time of every decoder layer, then of what follows them all (norm, head, MTP modules).
    """
    is_folded = layout.pipeline > 1 and layout.schedule in BIDIRECTIONAL
    units = config.layer_units()
    costs = (*(sum(costs[unit.start : unit.stop]) for unit in units), costs[-1])
    most = most_units or len(costs)
    borders = (_folded if is_folded else balanced)(costs, layout.num_stages, most)
    starts = [*(unit.start for unit in units), config.num_hidden_layers, config.num_hidden_layers]
    runs = enumerate(pairwise((0, *(starts[border] for border in borders))))
    return [
        PipelineStage(
            index=index,
            layers=tuple(range(first, last)),
            is_first=index == 0,
            is_last=index == layout.num_stages - 1,
        )
        for index, (first, last) in runs
    ]


def held(stages: list[PipelineStage], layout: ParallelLayout) -> list[list[PipelineStage]]:
    """The stages of every device along the pipeline."""
    count = layout.pipeline
    if count > 1 and layout.schedule in ("dualpipe", "dualpipev"):
        return [[stages[rank], stages[-1 - rank]] for rank in range(count)]
    return [stages[rank::count] for rank in range(count)]


def stage_work(config: ModelConfig, stage: PipelineStage, sequence_length: int) -> ForwardFlops:
    """Forward work of a token in `stage`."""
    work = ForwardFlops()
    for layer in stage.layers:
        work += layer_work(config, layer, sequence_length)
    if stage.is_last:
        work += ForwardFlops(plain=head_flops(config))
        for depth in range(config.num_nextn_predict_layers):
            work += mtp_work(config, depth, sequence_length)
    return work


def device_parameters(
    config: ModelConfig, stages: list[PipelineStage], layout: ParallelLayout
) -> dict[str, float]:
    """Parameters of a device that holds `stages`, by part of the model, before ZeRO sharding.

    Tensor parallelism divides every matrix except MLA's down-projections and the router (embedding
    and head only if `layout.divides_tables`); expert and tensor parallelism divide routed experts.
    """
    moe, hidden, tensor = config.moe, config.hidden_size, layout.tensor
    numbers = [layer for stage in stages for layer in stage.all_layers(config)]
    layers = len(numbers)
    sparse = sum(stage.moe_layers(config) for stage in stages)
    first, last = any(s.is_first for s in stages), any(s.is_last for s in stages)
    table = config.vocab_size * hidden / layout.table_parts
    depth = config.num_nextn_predict_layers if last else 0
    needs_embedding = first or depth or (last and config.tie_word_embeddings)
    expert = 0.0 if moe is None else sparse * expert_parameters(config) / tensor
    return {
        "embedding": table if needs_embedding else 0.0,
        "head": table if last and not config.tie_word_embeddings else 0.0,
        "attention": float(sum(_attention(config, layer, tensor) for layer in numbers)),
        "dense MLP": (layers - sparse) * mlp_parameters(config, config.intermediate_size) / tensor,
        "shared experts": 0.0 if moe is None else expert * moe.n_shared_experts,
        ROUTED: 0.0 if moe is None else expert * moe.n_routed_experts / layout.expert,
        "router": 0.0 if moe is None else float(sparse * gate_parameters(config, moe)),
        "norms": float(hidden * (2 * layers + last + 3 * depth)),
        "MTP joint": 2.0 * hidden * hidden * depth,
    }


def _attention(config: ModelConfig, layer: int, tensor: int) -> float:
    """Attention parameters of `layer` on one of `tensor` devices."""
    attention, whole = config.attention_of(layer), attention_parameters(config, layer)
    if not isinstance(attention, MLAConfig | GLAConfig):
        return whole / tensor
    rank = attention.q_lora_rank or 0
    shared = config.hidden_size * (rank + attention.entry_dim) + rank + attention.kv_lora_rank
    return shared + (whole - shared) / tensor


@lru_cache(maxsize=1024)
def _folded(costs: tuple[float, ...], parts: int, most: int) -> tuple[int, ...]:
    """As `balanced`, where run i and run parts - 1 - i share a device."""
    if parts == 2:
        return balanced(costs, parts, most)
    best: tuple[float, tuple[int, ...]] | None = None
    count = len(costs)
    for first in range(1, min(most, count - parts + 1) + 1):
        for last in range(count - 1, max(count - 2 - most, first + parts - 3), -1):
            outer = (sum(costs[:first]) + sum(costs[last:])) / 2
            if best is not None and outer > best[0]:
                break
            if last - first > most * (parts - 2):
                continue
            # `balanced` treats the last cost as the tail, so a tail of cost 0 is appended.
            inner = (0, *balanced((*costs[first:last], 0.0), parts - 2, most)[:-1], last - first)
            runs = [sum(costs[first + a : first + b]) for a, b in pairwise(inner)]
            middle = max((a + b) / 2 for a, b in zip(runs, reversed(runs), strict=True))
            found = (max(outer, middle), (*(first + end for end in inner), count))
            best = found if best is None else min(best, found)
    assert best is not None
    return best[1]


@lru_cache(maxsize=1024)
def balanced(costs: tuple[float, ...], parts: int, most: int) -> tuple[int, ...]:
    """Linear partition by dynamic programming: ends of `parts` nonempty runs of `costs` whose
    largest sum is minimal. A run has at most `most` costs, not counting the last cost.
    """
    count = len(costs)
    sums = [0.0, *accumulate(costs)]
    # row[end]: least largest sum of the first `end` costs, and where the last run begins
    row = {0: (0.0, 0)}
    rows = []
    for part in range(1, parts + 1):
        row = {
            end: min(
                (max(row[start][0], sums[end] - sums[start]), start)
                for start in row
                if start < end and min(end, count - 1) - start <= most
            )
            for end in range(part, count - (parts - part) + 1)
            if any(start < end and min(end, count - 1) - start <= most for start in row)
        }
        rows.append(row)
    ends = [count]
    for row in reversed(rows[1:]):
        ends.append(row[ends[-1]][1])
    return tuple(reversed(ends))
