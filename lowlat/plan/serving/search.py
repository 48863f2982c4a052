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
    return RankedLayouts(
        fitting=by_speed(fitting),
        too_large=sorted(
            (each for each in found if not each.fits), key=lambda each: each.missing_bytes
        ),
    )


def by_speed(found: list[ServingEstimate]) -> list[ServingEstimate]:
    """Fastest first; those within TIE of the fastest of them by time to first token."""
    ordered = sorted(found, key=lambda each: each.tokens_per_second, reverse=True)
    groups: list[list[ServingEstimate]] = []
    for each in ordered:
        if groups and each.tokens_per_second > (1 - TIE) * groups[-1][0].tokens_per_second:
            groups[-1].append(each)
        else:
            groups.append([each])
    return [each for group in groups for each in sorted(group, key=lambda each: each.first_token)]


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
