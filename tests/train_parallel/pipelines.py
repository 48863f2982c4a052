"""The pipelines that are compared with one process."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

LOSSES, NORMS, TENSORS = 1e-6, 1e-4, 5e-6
"""Largest relative difference allowed over 20 steps in fp32: of every loss (main, MTP, z,
sequence-wise, indexers' with their recall); of every gradient norm, which follows the rounding of
weights more closely; of each gradient of the first step and each weight after the last, in its
norm. Expert loads are equal.
"""
NORM = 6
"""Place of the gradient norm in the rows of `training`: after the losses, before the loads."""
LAYERS = 7
"""Enough for four processes with two stages each."""


@dataclass(frozen=True)
class Pipeline:
    """A pipeline, what else is divided, and what is trained."""

    schedule: str
    size: int = 2
    others: Mapping[str, int] = field(default_factory=dict)
    """Sizes of other axes."""
    steps: int = 20
    tied: bool = False
    recompute: bool = False
    attention: str = "mla"
    masks: bool = False
    optimizer: str = "adamw"
    bf16: bool = False

    @property
    def processes(self) -> int:
        product = self.size
        for axis, size in self.others.items():
            product *= 1 if axis == "expert" else size
        return product

    @property
    def training(self) -> dict[str, Any]:
        """What is trained, however it is divided."""
        mine = asdict(self)
        changes = {"num_hidden_layers": LAYERS, "tie_word_embeddings": mine.pop("tied")}
        for key in ("schedule", "size", "others"):
            mine.pop(key)
        return mine | {"changes": changes}

    @property
    def spec(self) -> dict[str, Any]:
        """As `training` reads it."""
        sizes = {"pipeline": self.size, "pipeline_schedule": self.schedule, **self.others}
        return self.training | {"parallel": sizes}

    def __str__(self) -> str:
        sizes = "".join(f"-{axis}{size}" for axis, size in self.others.items())
        changes = [
            str(value if isinstance(value, str) else key)
            for key, value in asdict(self).items()
            if key not in ("schedule", "size", "others", "steps")
            and value != getattr(Pipeline(""), key)
        ]
        return "-".join([f"{self.schedule}{self.size}{sizes}", *changes])


SHORT = [
    Pipeline("1f1b", steps=3, tied=True, masks=True),
    Pipeline("interleaved", steps=3),
    Pipeline("zb", steps=3, tied=True, recompute=True),
    Pipeline("dualpipev", steps=3, tied=True),
    Pipeline("1f1b", steps=3, attention="dsa-warmup"),
    Pipeline("zb", steps=3, attention="dsa", masks=True),
    Pipeline("interleaved", steps=3, attention="dsa-sharing"),
]
"""One of each kind."""

ALL = [
    Pipeline("1f1b"),
    Pipeline("1f1b", tied=True, masks=True),
    Pipeline("1f1b", attention="gqa", recompute=True, optimizer="muon"),
    Pipeline("1f1b", attention="layers"),
    Pipeline("interleaved", tied=True),
    Pipeline("interleaved", recompute=True, masks=True),
    Pipeline("zb"),
    Pipeline("zb", tied=True, recompute=True),
    Pipeline("zb", attention="gqa", optimizer="muon"),
    Pipeline("zbv", tied=True),
    Pipeline("zbv", recompute=True, masks=True),
    Pipeline("dualpipev"),
    Pipeline("dualpipev", tied=True, recompute=True),
    Pipeline("dualpipev", attention="gqa", optimizer="muon"),
    Pipeline("1f1b", size=4, tied=True),
    Pipeline("interleaved", size=4),
    Pipeline("zb", size=4, tied=True),
    Pipeline("zbv", size=4),
    Pipeline("dualpipev", size=4, tied=True),
    Pipeline("1f1b", others={"data": 2}),
    Pipeline("1f1b", others={"fsdp": 2}, tied=True),
    Pipeline("1f1b", others={"data": 2, "expert": 2}),
    Pipeline("1f1b", others={"tensor": 2}),
    Pipeline("1f1b", others={"context": 2}, masks=True),
    Pipeline("interleaved", others={"fsdp": 2, "expert": 2}),
    Pipeline("interleaved", others={"fsdp": 2}, recompute=True),
    Pipeline("zb", others={"fsdp": 2}),
    Pipeline("zb", others={"data": 2, "expert": 2}, recompute=True),
    Pipeline("dualpipev", others={"data": 2, "expert": 2}, tied=True),
    Pipeline("dualpipev", others={"tensor": 2}),
    Pipeline("interleaved", attention="dsa-warmup"),
    Pipeline("dualpipev", attention="dsa", recompute=True),
    Pipeline("zb", attention="dsa", others={"fsdp": 2}),
    Pipeline("1f1b", attention="dsa", others={"tensor": 2}),
    Pipeline("1f1b", attention="dsa-warmup", others={"context": 2}, masks=True),
    Pipeline("dualpipev", attention="dsa-sharing", recompute=True),
    Pipeline("1f1b", attention="dsa-sharing", others={"tensor": 2}),
]
