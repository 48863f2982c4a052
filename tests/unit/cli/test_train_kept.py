"""lowlat train: what a run's folder keeps runs again."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowlat.cli import main

from .test_train_errors import RECIPE, folder

__all__ = ["folder"]


def test_the_kept_recipe_is_what_ran(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--set included: next to the recipe it came from it gives the same model."""
    (folder / "r.toml").write_text(RECIPE)

    def train(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["lowlat", "train", "--quiet", *arguments])
        with pytest.raises(SystemExit) as ended:
            main.run()
        assert not ended.value.code

    train("r.toml", "--out", "a", "--set", "phase.0.steps=1", "--set", "seed=5")
    (folder / "again.toml").write_text((folder / "a" / "recipe.toml").read_text())
    train("again.toml", "--out", "b")
    first, second = (load_file(folder / run / "model" / "model.safetensors") for run in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
