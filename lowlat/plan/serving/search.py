"""Ranking of the parallel layouts of a cluster for serving: by decode throughput, then by time to
first token."""

from dataclasses import dataclass

from lowlat.config.model import ModelConfig
from lowlat.config.serving_layout import ServingLayout
from lowlat.plan.serving.estimate import ServingEstimate, ServingJob, estimate
from lowlat.plan.serving.layout import check_layout
from lowlat.plan.serving.machines import Cluster
from lowlat.utils.errors import UserError

TIE = 0.01
"""Layouts whose throughput differs by less than this share are ranked by time to first token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankedLayouts:
    """All layouts of a cluster that divide the model."""

    fitting: list[ServingEstimate]
    """Best first."""
    too_large: list[ServingEstimate]
    """Layouts that do not fit, with the fewest missing bytes first."""


def rank_layouts(
    config: ModelConfig, job: ServingJob, cluster: Cluster, layouts: list[ServingLayout]
) -> RankedLayouts:
    """Estimate and rank `layouts`."""
    found = [estimate(config, job, cluster, layout) for layout in layouts]
    fitting = [each for each in found if each.fits]
    best = max((each.tokens_per_second for each in fitting), default=0.0)

    def place(each: ServingEstimate) -> tuple[int, float]:
        # throughputs within a tie share a step of this scale
        return round(best / each.tokens_per_second / TIE), each.first_token

    return RankedLayouts(
        fitting=sorted(fitting, key=place),
        too_large=sorted(
            (each for each in found if not each.fits), key=lambda each: each.missing_bytes
        ),
    )


def all_layouts(config: ModelConfig, cluster: Cluster) -> list[ServingLayout]:
    """Every layout that divides `config` and whose ranks divide the devices of `cluster`. An expert
    size within the tensor size changes nothing, as experts take all ranks of a stage.
    """
    devices = cluster.devices
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    experts = sizes if config.moe is not None else [1]
    layouts = (
        ServingLayout(tensor=tensor, pipeline=pipeline, expert=expert)
        for pipeline in sizes
        for tensor in sizes
        for expert in experts
        if expert == 1 or expert > tensor
    )
    return [
        layout for layout in layouts if devices % layout.processes == 0 and _divides(config, layout)
    ]


def _divides(config: ModelConfig, layout: ServingLayout) -> bool:
    try:
        check_layout(config, layout)
    except UserError:
        return False
    return True
