"""What a study is: arms that differ in one thing, seeds, data, and the recipe of every run.

Owns the way from an arm and a seed to a Recipe. Running is `run`'s; which arms there are say
`attention`, `balance`, `mtp` and `precision`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowlat.config.model import ModelConfig
from lowlat.data.dataset import TokenizedDataset
from lowlat.train.inputs.configs import base_config
from lowlat.train.recipe.schema import Recipe, parse_recipe
from lowlat.utils.errors import UserError
from lowlat_lab.study.sizes import Size

OPTIMIZER = "muon"
"""Learns several times more than AdamW from so few tokens."""
WARM_UP = 0.06
"""Share of the steps in which the learning rate rises."""
FALL = 0.4
"""Share of the steps in which it falls."""
LAST_RATE = 0.05
"""Learning rate at the end, over its peak."""
SAVES = 8
"""Checkpoints of a run, so that a killed study loses little."""
SPARE_CONTEXT = 256
"""Positions beyond the longest context that is measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One of the things that are compared."""

    name: str
    """Of its folder and on the command line."""
    label: str
    """In tables and pictures."""
    model: dict[str, Any]
    """The [model] table of its recipe."""
    sequence_weight: float = 1e-4
    """Alpha of the sequence-wise balance loss; without effect in dense models."""
    bias_update_speed: float = 1e-3
    """Gamma of the routing bias; without effect in dense models."""
    precision: str = "bf16"
    """Of the products, as recipes have it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A study before it is run."""

    kind: str
    """attention, balance, mtp or precision."""
    data: Path
    """Token folder, absolute."""
    size: Size
    steps: int
    """Optimiser steps of every run."""
    arms: tuple[Arm, ...]
    """The first is what the others are compared with."""
    seeds: tuple[int, ...]

    @property
    def baseline(self) -> Arm:
        return self.arms[0]

    @property
    def runs(self) -> list[tuple[Arm, int]]:
        """Every run in its order: all arms of a seed before the next seed, each time beginning
        with another arm, so that whatever the machine does meets all arms alike.
        """
        found = []
        for place, seed in enumerate(self.seeds):
            turn = place % len(self.arms)
            found += [(arm, seed) for arm in (*self.arms[turn:], *self.arms[:turn])]
        return found

    @property
    def tokens(self) -> int:
        """Input tokens of a run."""
        return self.steps * self.size.tokens_per_step

    def recipe(self, arm: Arm, seed: int) -> Recipe:
        """The recipe of one run; `seed` decides weights and order of the data."""
        return parse_recipe(self.raw_recipe(arm, seed), origin=f"study {self.kind}, arm {arm.name}")

    def raw_recipe(self, arm: Arm, seed: int) -> dict[str, Any]:
        """The same as TOML has it."""
        size, steps = self.size, self.steps
        warm_up, fall = max(1, round(steps * WARM_UP)), max(1, round(steps * FALL))
        peak = size.learning_rate
        segments = [{"to": peak, "steps": min(warm_up, steps)}]
        if steps > warm_up + fall:
            segments.append({"to": peak, "steps": steps - warm_up - fall})
        if steps > warm_up:
            segments.append({"to": peak * LAST_RATE})
        return {
            "name": f"{self.kind}-{arm.name}-{seed}",
            "seed": seed,
            "precision": arm.precision,
            "data": {"folder": str(self.data)},
            "optimizer": {"name": OPTIMIZER},
            "balance": {"sequence_weight": arm.sequence_weight},
            "checkpoints": {"every_steps": max(1, -(-steps // SAVES))},
            "evaluation": {"every_steps": max(1, steps // 10), "sequences": 32},
            "log": {"tensorboard": False},
            "model": arm.model,
            "phase": [
                {
                    "name": "train",
                    "steps": steps,
                    "sequence_length": size.sequence_length,
                    "batch_size": size.batch_size,
                    "micro_batch_size": size.micro_batch_size,
                    "learning_rate": segments,
                    "bias_update_speed": arm.bias_update_speed,
                }
            ],
        }


def model_table(size: Size, attention: dict[str, Any], intermediate_size: int) -> dict[str, Any]:
    """The [model] table of a dense model of `size`."""
    return {
        "model_type": "lowlat",
        "hidden_size": size.hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": size.num_hidden_layers,
        "max_position_embeddings": size.decode_context + SPARE_CONTEXT,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "attention": attention,
        "rope": {"rope_theta": 10000.0},
    }


def config_of(model: dict[str, Any], vocab_size: int) -> ModelConfig:
    """The model that a [model] table describes over data with `vocab_size` token ids."""
    raw = {"name": "sizes", "model": model, "data": {"folder": "."}, "phase": [_ANY_PHASE]}
    return base_config(parse_recipe(raw, origin="study"), None, vocab_size, "study")


_ANY_PHASE = {
    "name": "none",
    "steps": 1,
    "sequence_length": 1,
    "batch_size": 1,
    "micro_batch_size": 1,
    "learning_rate": 0.0,
}


def choose_arms(arms: Sequence[Arm], names: str | None) -> tuple[Arm, ...]:
    """The arms that `names` ('mha,mla') lists, in the order of `arms`; all for None.

    Raises UserError for an unknown name, and where the first, which the others are compared with,
    is missing or alone.
    """
    if names is None:
        return tuple(arms)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = [arm.name for arm in arms]
    for name in wanted:
        if name not in known:
            raise UserError(f"--arms: '{name}' is unknown; choose from {', '.join(known)}")
    if known[0] not in wanted or len(set(wanted)) < 2:
        raise UserError(f"--arms {names}: give {known[0]}, the baseline, and one more at least")
    return tuple(arm for arm in arms if arm.name in wanted)


def num_steps(size: Size, *, steps: int | None, tokens: int | None) -> int:
    """Steps of a run: `steps`, or those that read about `tokens`, or the size's own.

    Raises UserError where both are given.
    """
    if steps is not None and tokens is not None:
        raise UserError("--steps and --tokens say the same; give one of them")
    if tokens is not None:
        return max(1, round(tokens / size.tokens_per_step))
    return size.steps if steps is None else steps


def open_data(folder: Path, size: Size) -> TokenizedDataset:
    """The tokenized dataset of a study. Raises UserError as TokenizedDataset, or where no documents
    are held out to measure on.
    """
    opened = TokenizedDataset.open(folder.resolve())
    least = size.sequence_length + 3
    if opened.num_tokens("held_out") < least:
        raise UserError(
            f"{folder}: holds {opened.num_tokens('held_out')} held-out tokens, and a window needs "
            f"{least}; build it again with more documents held out"
        )
    return opened
