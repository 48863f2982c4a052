"""Check that a parallel layout of serving divides a model: heads, experts, layers."""

from lowlat.config.attention import GQAConfig, GTAConfig
from lowlat.config.model import ModelConfig
from lowlat.config.serving_layout import ServingLayout
from lowlat.utils.errors import UserError


def check_layout(config: ModelConfig, layout: ServingLayout) -> None:
    """Raise UserError naming the axis if `layout` does not divide `config`."""
    heads = config.num_attention_heads
    if isinstance(config.attention, GQAConfig | GTAConfig):
        heads = config.attention.num_key_value_heads
    experts = 1 if config.moe is None else config.moe.n_routed_experts
    small, large = sorted((layout.tensor, layout.expert))
    layers = config.num_hidden_layers
    problems = (
        (
            layout.expert > 1 and config.moe is None,
            f"expert={layout.expert}: the model has no routed experts; leave out expert",
        ),
        (heads % layout.tensor, f"tensor={layout.tensor}: must divide the {heads} attention heads"),
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
        (layout.pipeline > layers, f"pipeline={layout.pipeline}: the model has {layers} layers"),
    )
    for is_wrong, message in problems:
        if is_wrong:
            raise UserError(f"--parallel {message}")
