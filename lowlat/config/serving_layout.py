"""Parallel layout of a served model: tensor, pipeline and expert parallelism, parsed from
`tensor=2,pipeline=2,expert=4`, and the check that it divides a model.
"""

import re
from dataclasses import asdict, dataclass

from lowlat.config.attention import GQAConfig, GTAConfig
from lowlat.config.model import ModelConfig
from lowlat.utils.errors import UserError

AXES = ("tensor", "pipeline", "expert")
MOST_RANKS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingLayout:
    """Processes (ranks) that share one model: pipeline stages of max(tensor, expert) ranks."""

    tensor: int = 1
    """Ranks that divide attention heads, MLP channels and the head's rows."""
    pipeline: int = 1
    """Stages, which divide the layers."""
    expert: int = 1
    """Ranks that divide the routed experts. The experts of a stage are divided among all of its
    ranks; with `expert` alone, attention and dense layers are repeated."""

    @property
    def stage_ranks(self) -> int:
        """Ranks of a pipeline stage."""
        return max(self.tensor, self.expert)

    @property
    def ranks(self) -> int:
        """Ranks of the model."""
        return self.pipeline * self.stage_ranks

    def __str__(self) -> str:
        sizes = [f"{axis}={size}" for axis, size in asdict(self).items() if size > 1]
        return ",".join(sizes) or "one process"


def parse_layout(text: str) -> ServingLayout:
    """`"tensor=2,pipeline=2"` -> the layout; axes left out are 1. Raises UserError."""
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(\w+)=([0-9]{1,4})", part)
        if match is None or match[1] not in AXES or not 1 <= int(match[2]) <= MOST_RANKS:
            raise UserError(
                f"--parallel '{part}': write sizes from 1 to {MOST_RANKS} of {', '.join(AXES)}, "
                "such as tensor=2,pipeline=2"
            )
        if match[1] in sizes:
            raise UserError(f"--parallel names {match[1]} twice; give it once")
        sizes[match[1]] = int(match[2])
    return ServingLayout(**sizes)


def check_layout(config: ModelConfig, layout: ServingLayout) -> None:
    """Raise UserError naming the axis if `layout` does not divide `config`."""
    heads = config.num_attention_heads
    if isinstance(config.attention, GQAConfig | GTAConfig):
        heads = config.attention.num_key_value_heads
    experts = 1 if config.moe is None else config.moe.n_routed_experts
    small, large = sorted((layout.tensor, layout.expert))
    layers = config.num_hidden_layers
    problems = (
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
            config.moe is not None and experts % layout.stage_ranks,
            f"tensor={layout.tensor}: the {experts} routed experts are divided among all ranks of "
            "a stage",
        ),
        (layout.pipeline > layers, f"pipeline={layout.pipeline}: the model has {layers} layers"),
    )
    for is_wrong, message in problems:
        if is_wrong:
            raise UserError(f"--parallel {message}")
