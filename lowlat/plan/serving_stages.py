"""Model share of each process of a serving layout: layers, heads and experts."""

from dataclasses import replace

from lowlat.config.model import ModelConfig
from lowlat.config.serving_layout import AUTO, EPLBConfig, ServingLayout
from lowlat.model.share import ModelShare
from lowlat.plan.serving.layout import check_layout, divides_blocks, stage_layers
from lowlat.utils.errors import UserError


def share_of(
    config: ModelConfig, layout: ServingLayout, rank: int, *, eplb: EPLBConfig | None = None
) -> ModelShare:
    """The share of process `rank`; groups for decoding and for prefill divide the model alike.
    Raises UserError if `layout` does not divide it, or if there are no experts for `eplb`."""
    check_layout(config, layout)
    stage, own = divmod(rank % layout.group_size, layout.stage_size)
    share = serving_stages(config, layout.pipeline)[stage]
    experts = 0 if config.moe is None else config.moe.n_routed_experts
    if eplb is not None and (experts == 0 or layout.stage_size == 1):
        raise UserError(f"--enable-eplb: --parallel {layout} divides no experts; add expert=E")
    if layout.stage_size == 1:
        return share
    redundant = 0 if eplb is None else eplb.num_redundant_experts
    if redundant % layout.stage_size:
        raise UserError(
            f"--num-redundant-experts {redundant}: must be a multiple of the {layout.stage_size} "
            "processes that divide the experts"
        )
    return replace(
        share,
        tensor=layout.tensor,
        tensor_rank=own % layout.tensor,
        experts=layout.stage_size if experts else 1,
        expert_rank=own if experts else 0,
        redundant_experts=redundant,
    )


def requested_layout(
    text: str, config: ModelConfig, *, processes: int, local: int, is_native: bool
) -> ServingLayout:
    """The layout of --parallel `text`. AUTO divides every layer among the `local` processes of a
    machine, by tensor parallelism on native kernels, else by experts, and the layers among
    machines; a model that cannot be divided so is divided by layers alone. Raises UserError.
    """
    if text != AUTO:
        return ServingLayout.parse(text)
    machines = processes // local
    is_tensor = is_native and divides_blocks(config, local)
    layouts = [
        *([ServingLayout(tensor=local, pipeline=machines)] if is_tensor else []),
        ServingLayout(expert=local, pipeline=machines),
        ServingLayout(pipeline=processes),
    ]
    for layout in layouts[:-1]:
        try:
            check_layout(config, layout)
            return layout
        except UserError:
            continue
    return layouts[-1]


def serving_stages(config: ModelConfig, count: int) -> list[ModelShare]:
    """The pipeline stages in order, as `stage_layers` divides the layers."""
    return [
        ModelShare(
            layers=layers,
            is_first=layers.start == 0,
            is_last=layers.stop == config.num_hidden_layers,
        )
        for layers in stage_layers(config, count)
    ]
