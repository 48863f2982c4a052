"""A small GQA model, the MLA model converted from it exactly, and the same damaged: what the tests
of distillation train.
"""

from pathlib import Path
from typing import Any

import torch

from lowlat.checkpoint.load import load_model
from lowlat.checkpoint.save import save_model
from lowlat.convert.run import convert
from tests.fakes import gqa_config

from . import tuning

PHASE = {
    "name": "heal",
    "steps": 8,
    "sequence_length": 31,
    "batch_size": 4,
    "micro_batch_size": 2,
    "learning_rate": 3e-3,
}
DAMAGE = 0.3
"""Noise on every attention matrix, in shares of its own size."""


def teacher(folder: Path, **changes: Any) -> Path:
    return tuning.checkpoint(folder / "teacher", gqa_config(**changes))


def student(folder: Path) -> Path:
    """The teacher as MLA, whose every logit is the teacher's up to rounding."""
    convert(folder / "teacher", folder / "student", to="mla", dtype="fp32")
    return folder / "student"


def damaged(folder: Path) -> Path:
    """The student with noise in its attention."""
    loaded = load_model(folder / "student", dtype="fp32")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if ".self_attn." in name:
                size = DAMAGE * parameter.square().mean().sqrt()
                parameter += size * torch.randn(parameter.shape, generator=generator)
    save_model(loaded.model, loaded.config, folder / "damaged", source=folder / "student")
    return folder / "damaged"


def models(folder: Path) -> None:
    """teacher, student, damaged and tokens in `folder`."""
    teacher(folder)
    student(folder)
    damaged(folder)
    tuning.chats(folder / "tokens")


def raw(*changes: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A recipe that heals `damaged`; `changes` are those of its phases."""
    base = tuning.raw_recipe(
        base_model="damaged",
        trainable="attention",
        distillation={"teacher": "teacher"},
        phase=[PHASE | change for change in changes or ({},)],
        optimizer={"weight_decay": 0.0},
    )
    return base | more


def train(folder: Path, recipe: dict[str, Any], **options: Any) -> tuning.Run:
    given = {"base_model": folder / recipe["base_model"], "teacher": folder / "teacher"}
    return tuning.train(folder, recipe, **(given | options))
