"""LoRA in training (arXiv 2106.09685): which projections get an update, what of a model is then
trained and saved, and how updates are merged into the weights.

Owns the rules; parameters and products of updates are `model.low_rank`'s, their files
`lora_files`'s.
"""

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn

from lowlat.config.model import ModelConfig
from lowlat.model.linear import Linear
from lowlat.model.low_rank import LowRank, LowRankExperts
from lowlat.model.moe import StackedExperts
from lowlat.model.stacking import stack_experts
from lowlat.model.transformer import Transformer
from lowlat.train.recipe.schema import LoraConfig, Recipe
from lowlat.train.step.trainable import check_biases_stay
from lowlat.utils.errors import UserError

UPDATE = ".low_rank."
"""In the name of every parameter of an update, after the name of the module it belongs to."""
A, B = "lora_A", "lora_B"
EXPERT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def check_lora(config: ModelConfig, recipe: Recipe, origin: str) -> None:
    """Raises UserError where `recipe` asks for what does not go with frozen weights."""
    if recipe.lora is None:
        return
    if recipe.precision == "fp8":
        raise UserError(f"{origin}: lora trains in bf16 or fp32; set precision = 'bf16'")
    sizes = recipe.parallel
    if sizes.processes > sizes.data or sizes.expert > 1:
        raise UserError(f"{origin}: lora divides batches only; set all of [parallel] but data to 1")
    check_biases_stay(config, recipe, "lora", origin)
    _check_modules({name for name, _ in _shapes(config)}, recipe.lora, origin)


def base_dtype(recipe: Recipe) -> str:
    """Of the frozen weights in memory: that of the products."""
    return "fp32" if recipe.precision == "fp32" else "bf16"


def add_updates(model: Transformer, table: LoraConfig, *, seed: int, origin: str) -> None:
    """Freeze `model` and give the projections that `table` names an update that changes nothing
    yet: A uniform within 1 / sqrt(in), as peft draws it, B zero.

    Routed experts, which must be stacked, get a pair each. Raises UserError for a name that no
    projection has.
    """
    _check_modules({name for name, _, _ in _projections(model)}, table, origin)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, module, weight in list(_projections(model)):
        if isinstance(module, StackedExperts):
            module.low_rank = _of_experts(module, table)
        elif name in table.target_modules:
            module.low_rank = _update(weight, table)
    for module in model.modules():
        if isinstance(module, LowRank):
            bound = 1 / math.sqrt(module.lora_A.shape[-1])
            nn.init.uniform_(module.lora_A, -bound, bound, generator=generator)
            nn.init.zeros_(module.lora_B)


def _projections(model: Transformer) -> Iterator[tuple[str, Linear | StackedExperts, Tensor]]:
    """Every projection that may have an update: its name, the module that has it, its weight."""
    for name, module in model.named_modules():
        if isinstance(module, StackedExperts):
            yield from ((own, module, weight) for own, weight in _expert_weights(module).items())
        elif isinstance(module, Linear) and module is not model.lm_head:
            yield name.rpartition(".")[2], module, module.weight


def _check_modules(present: set[str], table: LoraConfig, origin: str) -> None:
    """Raises UserError where `table` names a projection that is not among those `present`; of the
    default ones any will do.
    """
    absent = sorted(set(table.target_modules) - present)
    none = not set(table.target_modules) & present
    if absent and (none or "target_modules" in table.model_fields_set):
        raise UserError(
            f"{origin}: lora.target_modules: the model has no {', '.join(absent)}; "
            f"it has {', '.join(sorted(present))}"
        )


@lru_cache(maxsize=8)
def _shapes(config: ModelConfig) -> tuple[tuple[str, torch.Size], ...]:
    """Names and shapes of all projections of a model of `config`, for which no memory is taken."""
    with torch.device("meta"):
        model = Transformer(config)
        stack_experts(model)
    return tuple((name, weight.shape) for name, _, weight in _projections(model))


def updated_shapes(config: ModelConfig, table: LoraConfig) -> list[torch.Size]:
    """Of the weights of a model of `config` that `table` asks updates of; experts' are stacked, and
    gate and up stand for themselves.
    """
    return [shape for name, shape in _shapes(config) if name in table.target_modules]


def count_updates(config: ModelConfig, table: LoraConfig) -> int:
    """Parameters of the updates that `table` asks of a model of `config`."""
    return sum(
        math.prod(stack) * table.rank * (rows + columns)
        for *stack, rows, columns in updated_shapes(config, table)
    )


def count_added_up(config: ModelConfig, table: LoraConfig) -> int:
    """Weights of experts that are added up with their updates in every pass
    (`LowRankExperts.added`): gate and up rows are one tensor, so an update of one copies both.
    """
    asked = set(table.target_modules)
    both = set(EXPERT_PROJECTIONS[:2])
    asked |= both if asked & both else set()
    return sum(
        math.prod(shape) for name, shape in _shapes(config) if len(shape) == 3 and name in asked
    )


def is_update(name: str) -> bool:
    """Whether the parameter `name` belongs to an update."""
    return UPDATE in name


def merged(parameters: Mapping[str, Tensor], table: LoraConfig) -> Iterator[tuple[str, Tensor]]:
    """`parameters`, experts stacked, with their updates added in fp32: those of a model without
    updates, one after the other.
    """
    scale = table.alpha / table.rank
    for name, weight in parameters.items():
        if is_update(name):
            continue
        owner, _, own = name.rpartition(".")
        if own == "gate_up_proj":
            deltas = [_delta(parameters, owner, scale, part) for part in EXPERT_PROJECTIONS[:2]]
            if any(delta is not None for delta in deltas):
                halves = zip(weight.chunk(2, dim=1), deltas, strict=True)
                weight = torch.cat([_sum(half, delta) for half, delta in halves], dim=1)
        elif own == "down_proj":
            weight = _sum(weight, _delta(parameters, owner, scale, own))
        elif own == "weight":
            weight = _sum(weight, _delta(parameters, owner, scale))
        yield name, weight


def _sum(weight: Tensor, delta: Tensor | None) -> Tensor:
    return weight if delta is None else weight + delta


def _delta(
    parameters: Mapping[str, Tensor], owner: str, scale: float, part: str | None = None
) -> Tensor | None:
    """What is added to the weight of module `owner`, or to its experts' projection `part`."""
    prefix = owner + UPDATE + (f"{part}." if part else "")
    if prefix + A not in parameters:
        return None
    return (scale * parameters[prefix + B]) @ parameters[prefix + A]


def _update(weight: Tensor, table: LoraConfig) -> LowRank:
    *stack, rows, columns = weight.shape
    scale = table.alpha / table.rank
    return LowRank(*stack, rank=table.rank, rows=rows, columns=columns, scale=scale)


def _of_experts(experts: StackedExperts, table: LoraConfig) -> LowRankExperts | None:
    if not set(EXPERT_PROJECTIONS) & set(table.target_modules):
        return None
    return LowRankExperts(
        **{
            name: _update(weight, table) if name in table.target_modules else None
            for name, weight in _expert_weights(experts).items()
        }
    )


def _expert_weights(experts: StackedExperts) -> dict[str, Tensor]:
    half = experts.gate_up_proj.chunk(2, dim=1)[0]
    return dict(zip(EXPERT_PROJECTIONS, (half, half, experts.down_proj), strict=True))
