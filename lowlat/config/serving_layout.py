"""Parallel layout of serving: the sizes of `--parallel pipeline=2`."""

from dataclasses import dataclass, fields

from lowlat.utils.errors import UserError

AUTO = "auto"
"""The value of --parallel for a layout of the processes that were started."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EPLBConfig:
    """Expert parallelism load balancing (EPLB), with vLLM's names."""

    num_redundant_experts: int = 0
    """Replicas of routed experts per layer, beyond one of each."""
    step_interval: int = 3000
    """Steps between two placements of the experts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingLayout:
    """Sizes of parallelism over the processes that serve one model."""

    tensor: int = 1
    """Processes of a stage that divide attention heads and rows of dense layers."""
    pipeline: int = 1
    """Stages, which divide the layers."""
    expert: int = 1
    """Processes of a stage that divide the routed experts; if it exceeds tensor, each part of
    attention and dense layers has expert / tensor copies."""
    prefill: int = 0
    """Groups of processes that compute prompts for the first group, which decodes (disaggregated
    prefill); the other sizes divide the model in each of them."""

    @classmethod
    def parse(cls, text: str) -> "ServingLayout":
        """The layout of `KEY=SIZE,...`. Raises UserError."""
        names = [field.name for field in fields(cls)]
        sizes: dict[str, int] = {}
        for part in text.split(","):
            name, _, size = part.strip().partition("=")
            if name not in names:
                raise UserError(f"--parallel '{text}': '{name}' is none of {', '.join(names)}")
            if name in sizes:
                raise UserError(f"--parallel '{text}': {name} is given twice")
            if not size.isdecimal() or not 1 <= int(size) <= 4096:
                raise UserError(f"--parallel '{text}': write {name}=SIZE with a size from 1")
            sizes[name] = int(size)
        layout = cls(**sizes)
        if layout.stage_size % layout.tensor or layout.stage_size % layout.expert:
            raise UserError(
                f"--parallel '{text}': of tensor {layout.tensor} and expert {layout.expert} the "
                "smaller must divide the larger"
            )
        return layout

    @property
    def stage_size(self) -> int:
        """Processes of a stage, among which routed experts are divided."""
        return max(self.tensor, self.expert)

    @property
    def processes(self) -> int:
        """Processes of the run."""
        return (1 + self.prefill) * self.group_size

    @property
    def group_size(self) -> int:
        """Processes that divide the model: a group for decoding or for prefill."""
        return self.pipeline * self.stage_size

    def __str__(self) -> str:
        sizes = {f.name: getattr(self, f.name) for f in fields(self)}
        given = [f"{f.name}={sizes[f.name]}" for f in fields(self) if sizes[f.name] != f.default]
        return ",".join(given) or "pipeline=1"
