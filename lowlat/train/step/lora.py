"""LoRA training (arXiv 2106.09685): which projections get a low-rank update, the trainable and
checkpointed parameters, and merging of updates into the weights.
"""

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn

from lowlat.config.model import ModelConfig
from lowlat.model.linear import Linear
from lowlat.model.replace_modules import replace_modules
from lowlat.model.transformer import Transformer
from lowlat.train.layers.lora import LoraExperts, LoraLinear, LowRank, LowRankExperts
from lowlat.train.layers.stacked_experts import StackedExperts, stack_experts
from lowlat.train.recipe.schema import LoraConfig, Recipe
from lowlat.train.step.trainable import check_biases_stay
from lowlat.utils.errors import UserError

UPDATE = ".low_rank."
"""Follows the module's name in the name of every LoRA parameter."""
A, B = "lora_A", "lora_B"
EXPERT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def check_lora(config: ModelConfig, recipe: Recipe, origin: str) -> None:
    """Raises UserError if `recipe` combines LoRA with an option that frozen weights exclude."""
    if recipe.lora is None:
        return
    if recipe.precision == "fp8":
        raise UserError(f"{origin}: lora trains in bf16 or fp32; set precision = 'bf16'")
    sizes = recipe.parallel
    if sizes.processes > sizes.data or sizes.expert > 1:
        raise UserError(f"{origin}: lora supports parallel.data only; set other sizes to 1")
    check_biases_stay(config, recipe, "lora", origin)
    _check_modules({name for name, _ in _shapes(config)}, recipe.lora, origin)


def base_dtype(recipe: Recipe) -> str:
    """Dtype of the frozen weights in memory: that of the products."""
    return "fp32" if recipe.precision == "fp32" else "bf16"


def add_lora(model: Transformer, table: LoraConfig, *, seed: int) -> None:
    """Freeze `model` and add an update to the projections in `table`, initialized as in peft: A
    uniform within 1 / sqrt(in), B zero.

    Routed experts, which must be stacked, have one pair per expert.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)

    def with_update(path: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, StackedExperts):
            updates = _of_experts(module, table)
            return None if updates is None else LoraExperts(module, updates)
        is_named = path.rpartition(".")[2] in table.target_modules and module is not model.lm_head
        if isinstance(module, Linear) and is_named:
            return LoraLinear(module, _update(module.weight, table))
        return None

    replace_modules(model, with_update)
    for module in model.modules():
        if isinstance(module, LowRank):
            bound = 1 / math.sqrt(module.lora_A.shape[-1])
            nn.init.uniform_(module.lora_A, -bound, bound, generator=generator)
            nn.init.zeros_(module.lora_B)


def _projections(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Name and weight of every projection that may have an update."""
    for name, module in model.named_modules():
        if isinstance(module, StackedExperts):
            yield from _expert_weights(module).items()
        elif isinstance(module, Linear) and module is not model.lm_head:
            yield name.rpartition(".")[2], module.weight


def _check_modules(present: set[str], table: LoraConfig, origin: str) -> None:
    """Raises UserError if `table` names a projection that is not in `present`; of the default names
    one suffices.
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
    """Names and shapes of all projections of a model of `config`, without allocating it."""
    with torch.device("meta"):
        model = Transformer(config)
        stack_experts(model)
    return tuple((name, weight.shape) for name, weight in _projections(model))


def updated_shapes(config: ModelConfig, table: LoraConfig) -> list[torch.Size]:
    """Shapes of the weights of a model of `config` that get updates from `table`; experts are
    stacked, gate and up separate.
    """
    return [shape for name, shape in _shapes(config) if name in table.target_modules]


def count_updates(config: ModelConfig, table: LoraConfig) -> int:
    """Number of LoRA parameters for `table` on a model of `config`."""
    return sum(
        math.prod(stack) * table.rank * (rows + columns)
        for *stack, rows, columns in updated_shapes(config, table)
    )


def count_added_up(config: ModelConfig, table: LoraConfig) -> int:
    """Number of expert weights that are summed with their updates in every pass
    (`LowRankExperts.added`): gate and up rows are one tensor, so an update of one copies both.
    """
    asked = set(table.target_modules)
    both = set(EXPERT_PROJECTIONS[:2])
    asked |= both if asked & both else set()
    return sum(
        math.prod(shape) for name, shape in _shapes(config) if len(shape) == 3 and name in asked
    )


def is_lora_parameter(name: str) -> bool:
    """Whether the parameter `name` belongs to a low-rank update."""
    return UPDATE in name


def merged(parameters: Mapping[str, Tensor], table: LoraConfig) -> Iterator[tuple[str, Tensor]]:
    """LoRA merge in fp32: add B A alpha / rank to each weight.

    Yields the parameters of a model without LoRA, one at a time. Experts are stacked.
    """
    scale = table.alpha / table.rank
    for name, weight in parameters.items():
        if is_lora_parameter(name):
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
    """The update of the weight of module `owner`, or of its experts' projection `part`."""
    prefix = owner + UPDATE + (f"{part}." if part else "")
    if prefix + A not in parameters:
        return None
    return (scale * parameters[prefix + B]) @ parameters[prefix + A]


def _update(weight: Tensor, table: LoraConfig) -> LowRank:
    *stack, rows, columns = weight.shape
    scale = table.alpha / table.rank
    return LowRank(*stack, rank=table.rank, rows=rows, columns=columns, scale=scale)


def _of_experts(experts: StackedExperts, table: LoraConfig) -> LowRankExperts | None:
    weights = _expert_weights(experts).items()
    updates = {name: _update(w, table) for name, w in weights if name in table.target_modules}
    return LowRankExperts(updates) if updates else None


def _expert_weights(experts: StackedExperts) -> dict[str, Tensor]:
    half = experts.gate_up_proj.chunk(2, dim=1)[0]
    return dict(zip(EXPERT_PROJECTIONS, (half, half, experts.down_proj), strict=True))
