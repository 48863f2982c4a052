"""Division of a model among the processes of a parallel layout of serving: which layouts are
possible, and the layers of each pipeline stage.
"""

from itertools import pairwise

from lowlat.config.attention import GQAConfig, distinct
from lowlat.config.model import MLAConfig, ModelConfig
from lowlat.config.parameter_count import (
    attention_parameters,
    mlp_parameters,
    moe_parameters,
    mtp_parameters,
)
from lowlat.config.serving_layout import ServingLayout
from lowlat.plan.stages import balanced
from lowlat.utils.errors import UserError


def check_layout(config: ModelConfig, layout: ServingLayout) -> None:
    """Raise UserError naming the axis if `layout` does not divide `config`."""
    attentions = distinct(config.attention)
    experts = 1 if config.moe is None else config.moe.n_routed_experts
    small, large = sorted((layout.tensor, layout.expert))
    stages = len(config.layer_units())
    problems = (
        (
            layout.expert > 1 and config.moe is None,
            f"expert={layout.expert}: the model has no routed experts; leave out expert",
        ),
        (
            layout.tensor > 1 and not isinstance(attentions[0], MLAConfig | GQAConfig),
            f"tensor={layout.tensor}: only MLA, MHA, GQA and MQA are divided by heads",
        ),
        *(
            (count % layout.tensor, f"tensor={layout.tensor}: must divide the {count} {name}")
            for name, count in _divided_rows(config).items()
        ),
        (
            experts % layout.expert,
            f"expert={layout.expert}: must divide the {experts} routed experts",
        ),
        (
            large % small,
            f"tensor={layout.tensor},expert={layout.expert}: the smaller must divide the larger",
        ),
        (
            config.moe is not None and experts % layout.stage_size,
            f"tensor={layout.tensor}: the {experts} routed experts are divided among all ranks of "
            "a stage",
        ),
        (
            layout.pipeline > stages,
            f"pipeline={layout.pipeline}: the model's layers divide into at most {stages} stages",
        ),
    )
    for is_wrong, message in problems:
        if is_wrong:
            raise UserError(f"--parallel {message}")


def _divided_rows(config: ModelConfig) -> dict[str, int]:
    """What tensor parallelism divides, by name. Other vocabularies stay whole."""
    rows = {"attention heads": config.num_attention_heads}
    if isinstance(config.attention, GQAConfig):
        rows["key-value heads"] = config.attention.num_key_value_heads
    rows["channels of the residual stream"] = config.hidden_size
    moe = config.moe
    layers = range(config.num_hidden_layers)
    if moe is None or not all(config.is_moe_layer(layer) for layer in layers):
        rows["rows of dense MLPs"] = config.intermediate_size
    if moe is not None and moe.n_shared_experts:
        rows["rows of shared experts"] = moe.moe_intermediate_size * moe.n_shared_experts
    return rows


def divides_blocks(config: ModelConfig, tensor: int) -> bool:
    """Whether the parts of every projection are whole fp8 blocks, if `config` has them."""
    if config.quantization is None:
        return True
    rows = [count for name, count in _divided_rows(config).items() if "heads" not in name]
    for attention in distinct(config.attention):
        heads = attention.num_attention_heads
        rows.append(heads * attention.qk_head_dim)
        if isinstance(attention, GQAConfig):
            rows.append(attention.num_key_value_heads * attention.head_dim)
        elif isinstance(attention, MLAConfig):
            rows.append(heads * (attention.qk_nope_head_dim + attention.v_head_dim))
    return all(count % (tensor * config.quantization.weight_block_size[0]) == 0 for count in rows)


def stage_layers(config: ModelConfig, count: int) -> list[range]:
    """The layers of each of `count` pipeline stages, at most as many as `check_layout` allows. The
    largest stage has as few parameters as possible; the last has the head and the MTP modules."""
    units = config.layer_units()
    costs = [float(sum(_parameters(config, layer) for layer in unit)) for unit in units]
    costs[-1] += config.vocab_size * config.hidden_size
    depths = range(config.num_hidden_layers, config.num_cache_layers)
    costs[-1] += sum(mtp_parameters(config, layer) for layer in depths)
    ends = balanced(tuple(costs), count, len(costs))
    return [range(units[first].start, units[last - 1].stop) for first, last in pairwise((0, *ends))]


def _parameters(config: ModelConfig, layer: int) -> int:
    own = attention_parameters(config, layer)
    if config.moe is not None and config.is_moe_layer(layer):
        return own + moe_parameters(config, config.moe)
    return own + mlp_parameters(config, config.intermediate_size)
