"""A tiny conversion with healing and evaluation: model, texts, and the call."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowlat.convert.options import CompressionOptions, RecoveryOptions
from lowlat.convert.report import REPORT_FILE, ConversionReport
from lowlat.recovery.run import convert_with_recovery
from tests.unit.convert.test_compressed_folders import source_model

WORDS = ("the", "cat", "sat", "on", "a", "mat", "dog", "log", "and", "then", "ran", "home")
STEP = 160
"""Tokens of a step."""
TOKENS = 8 * STEP
MEASURED = ("seconds", "tokens_per_second")
"""What differs from one run to the next."""


def prose(lines: int, seed: int) -> str:
    drawn = random.Random(seed)
    return "\n".join(" ".join(drawn.choice(WORDS) for _ in range(12)) for _ in range(lines))


def make(folder: Path) -> Path:
    """`source`, heal.txt, calibrate.txt and evaluate.txt in `folder`."""
    source_model(folder / "source", intermediate_size=30)
    (folder / "heal.txt").write_text(prose(500, seed=1))
    (folder / "calibrate.txt").write_text(prose(100, seed=2))
    (folder / "evaluate.txt").write_text(prose(30, seed=3))
    return folder


def scale_down(patch: pytest.MonkeyPatch) -> None:
    """Steps and evaluations of few tokens."""
    patch.setattr("lowlat.train.run.distill.BATCH_TOKENS", STEP)
    # large random weights take no more
    patch.setattr("lowlat.train.run.distill.LEARNING_RATE", 3e-5)
    patch.setattr("lowlat.train.run.distill.FULL_STEPS", 1)
    for module in ("lowlat.train.run.distill", "lowlat.recovery.training_text"):
        patch.setattr(f"{module}.EVALUATED_TOKENS", 400)


def call(folder: Path, dst: Path, **changes: Any) -> ConversionReport:
    """Convert `folder/source`; `changes` are those of the options or arguments."""
    compression = CompressionOptions(share=0.5, calibrate=(folder / "calibrate.txt",))
    wanted = RecoveryOptions(
        tokens=TOKENS, texts=(str(folder / "heal.txt"),), evaluate=folder / "evaluate.txt"
    )
    own = {name: changes.pop(name) for name in list(changes) if hasattr(wanted, name)}
    cost = {name: changes.pop(name) for name in list(changes) if hasattr(compression, name)}
    return convert_with_recovery(
        folder / "source",
        dst,
        compression=replace(compression, **cost),
        recovery=replace(wanted, **own),
        **changes,
    )


def contents(folder: Path) -> dict[str, bytes | str]:
    """All files of a model's folder by name; conversion.json without what no two runs share."""
    found: dict[str, bytes | str] = {
        path.name: path.read_bytes() for path in sorted(folder.iterdir())
    }
    found[REPORT_FILE] = json.dumps(without_times(report(folder)))
    return found


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / REPORT_FILE).read_text())


def without_times(told: dict[str, Any]) -> dict[str, Any]:
    if "recovery" in told:
        told["recovery"] = {k: v for k, v in told["recovery"].items() if k not in MEASURED}
    return told
