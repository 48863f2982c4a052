"""The layouts that are compared with one process, and how closely they agree."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tests.train_parallel.processes import run

LOSSES = GRADIENTS = WEIGHTS = 5e-6
"""Largest relative difference allowed over 20 steps in fp32: of every loss and every gradient norm;
of each gradient of the first step and each weight after the last, in its norm.
"""


@dataclass(frozen=True)
class Case:
    """A division of the processes and what they train."""

    parallel: Mapping[str, int]
    attention: str = "mla"
    steps: int = 20
    recompute: bool = False
    optimizer: str = "adamw"
    masks: bool = False
    """Documents within a row do not see one another."""
    bf16: bool = False

    @property
    def processes(self) -> int:
        product = 1
        for axis, size in self.parallel.items():
            product *= 1 if axis == "expert" else size
        return product

    @property
    def training(self) -> dict[str, Any]:
        """What is trained, however it is divided."""
        return {key: value for key, value in asdict(self).items() if key != "parallel"}

    def __str__(self) -> str:
        sizes = "-".join(f"{axis}{size}" for axis, size in self.parallel.items())
        changes = [
            str(value if isinstance(value, str) else key)
            for key, value in self.training.items()
            if value != getattr(Case({}), key)
        ]
        return "-".join([sizes, *changes])


@dataclass
class Difference:
    """The largest of each kind, and where."""

    losses: float = 0.0
    gradients: float = 0.0
    weights: float = 0.0
    where: dict[str, str] = field(default_factory=dict)


SHORT = [
    Case({"data": 2, "expert": 2}, steps=4),
    Case({"fsdp": 2, "expert": 2}, attention="gqa", steps=4, recompute=True),
    Case({"tensor": 2}, steps=4),
    Case({"context": 2, "expert": 2}, steps=4, masks=True),
    Case({"context": 2, "expert": 2}, attention="dsa", steps=4, masks=True),
    Case({"fsdp": 2, "expert": 2}, attention="dsa-sharing", steps=4, recompute=True),
    Case({"tensor": 2}, attention="dsa-sharing", steps=4),
    Case({"fsdp": 2}, attention="dsa-warmup", steps=4),
]
"""A few, each with parts of several kinds."""

ALL = [
    Case({"data": 2}),
    Case({"fsdp": 2}),
    Case({"data": 2, "expert": 2}),
    Case({"fsdp": 2, "expert": 2}),
    Case({"tensor": 2}),
    Case({"context": 2}),
    Case({"data": 2}, masks=True),
    Case({"fsdp": 2}, attention="gqa", recompute=True),
    Case({"fsdp": 2}, recompute=True),
    Case({"fsdp": 2, "expert": 2}, attention="gqa"),
    Case({"data": 2, "expert": 2}, recompute=True),
    Case({"tensor": 2}, attention="gqa"),
    Case({"tensor": 2}, recompute=True),
    Case({"context": 2}, attention="gqa"),
    Case({"context": 2, "expert": 2}, masks=True, recompute=True),
    Case({"fsdp": 2}, optimizer="muon"),
    Case({"data": 2, "expert": 2}, optimizer="muon"),
    Case({"tensor": 2}, optimizer="muon"),
    Case({"context": 2}, attention="gla"),
    Case({"context": 2}, attention="gta"),
    Case({"context": 2}, attention="tpa", masks=True),
    Case({"fsdp": 2, "expert": 2}, attention="tpa"),
    Case({"tensor": 2}, attention="layers"),
    Case({"context": 2}, attention="layers", masks=True),
    Case({"fsdp": 2, "expert": 2}, attention="layers", recompute=True),
    Case({"data": 2, "expert": 2}, attention="dsa"),
    Case({"fsdp": 2}, attention="dsa", recompute=True),
    Case({"fsdp": 2, "expert": 2}, attention="dsa-sharing", recompute=True),
    Case({"tensor": 2}, attention="dsa"),
    Case({"tensor": 2}, attention="dsa-warmup"),
    Case({"context": 2}, attention="dsa-sharing", masks=True),
    Case({"context": 2}, attention="dsa-warmup"),
    Case({"fsdp": 2}, attention="dsa-warmup"),
    Case({"fsdp": 2}, bf16=True, steps=1),
    Case({"data": 4}),
    Case({"fsdp": 4}),
    Case({"data": 2, "fsdp": 2}),
    Case({"data": 4, "expert": 4}),
    Case({"data": 4, "expert": 2}),
    Case({"fsdp": 4, "expert": 2}),
    Case({"fsdp": 4, "expert": 4}, attention="gqa"),
    Case({"data": 2, "fsdp": 2, "expert": 2}),
    Case({"data": 2, "fsdp": 2, "expert": 4}),
    Case({"tensor": 4}),
    Case({"tensor": 2, "fsdp": 2}),
    Case({"tensor": 2, "fsdp": 2, "expert": 2}, recompute=True),
    Case({"tensor": 2, "data": 2, "expert": 2}, attention="gqa"),
    Case({"tensor": 2, "fsdp": 2}, optimizer="muon"),
    Case({"context": 4}, masks=True),
    Case({"context": 2, "data": 2}),
    Case({"context": 2, "data": 2, "expert": 4}, recompute=True),
    Case({"context": 2, "fsdp": 2, "expert": 2}, attention="gqa"),
    Case({"context": 2, "tensor": 2}),
    Case({"context": 2, "tensor": 2}, attention="dsa", masks=True),
    Case({"context": 2, "data": 2, "expert": 4}, attention="dsa-warmup", masks=True),
]


def divided(cases: list[Case], folder: Path) -> list[dict[str, Tensor]]:
    """What came of cases with one number of processes, which are started once for all of them."""
    folder.mkdir()
    specs = folder / "specs.json"
    specs.write_text(json.dumps([asdict(case) for case in cases]))
    program = ["-m", "tests.train_parallel.training", str(specs), str(folder)]
    run(cases[0].processes, program, timeout=60 + 120 * len(cases))
    return [load_file(folder / f"{index}.safetensors") for index in range(len(cases))]


def difference(alone: Mapping[str, Tensor], together: Mapping[str, Tensor]) -> Difference:
    assert alone.keys() == together.keys()
    result = Difference()
    for name, expected in alone.items():
        found, expected = together[name].double(), expected.double()
        error = found - expected
        if name == "losses":
            relative = (error.abs() / expected.abs().clamp(min=1e-3)).max()
        else:
            relative = error.norm() / expected.norm().clamp(min=1e-12)
        kind = {"losses": "losses", "gradient": "gradients"}.get(name.split(".")[0], "weights")
        if relative.item() >= getattr(result, kind):
            setattr(result, kind, relative.item())
            result.where[kind] = name
    return result


def by_processes(cases: Iterable[Case]) -> dict[int, list[Case]]:
    found: dict[int, list[Case]] = {}
    for case in cases:
        found.setdefault(case.processes, []).append(case)
    return found
