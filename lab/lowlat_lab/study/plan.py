"""Study plan: variants, seeds, data, and the training recipe of every run.

The variants are defined in `attention`, `balance`, `mtp` and `precision`.
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
from lowlat_lab.study.sizes import StudySize

OPTIMIZER = "muon"
"""Muon: needs several times fewer tokens than AdamW at these sizes."""
WARM_UP = 0.06
"""Share of warm-up steps."""
FALL = 0.4
"""Share of decay steps."""
LAST_RATE = 0.05
"""Learning rate at the end, over its peak."""
CHECKPOINTS = 8
"""Training checkpoints of a run."""
SPARE_CONTEXT = 256
"""Spare positions beyond the longest measured context."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A model or training setting that a study compares."""

    name: str
    """Name of its folder, and for --variants."""
    label: str
    """Label in tables and plots."""
    model: dict[str, Any]
    """The [model] table of its recipe."""
    sequence_weight: float = 1e-4
    """Weight (alpha) of the sequence-wise balance loss; no effect in dense models."""
    bias_update_speed: float = 1e-3
    """Update speed (gamma) of the routing bias; no effect in dense models."""
    precision: str = "bf16"
    """Precision of matrix products, as in recipes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyPlan:
    """Variants, seeds, data and size of a study."""

    kind: str
    """attention, balance, mtp or precision."""
    data: Path
    """Folder of the tokenized dataset, absolute."""
    size: StudySize
    steps: int
    """Optimizer steps of every run."""
    variants: tuple[Variant, ...]
    """The first is the baseline."""
    seeds: tuple[int, ...]
    limit: int | None = None
    """Most missing runs to train; None: all. The report has what is finished."""
    measures_speed: bool = True
    """Whether decode time is measured; else it is that of the last measurement, if there is one."""

    @property
    def baseline(self) -> Variant:
        return self.variants[0]

    @property
    def runs(self) -> list[tuple[Variant, int]]:
        """All runs in order: seed by seed, with a rotating order of variants, so that a
        disturbance of the machine affects all variants alike.
        """
        found = []
        for place, seed in enumerate(self.seeds):
            turn = place % len(self.variants)
            found += [(variant, seed) for variant in (*self.variants[turn:], *self.variants[:turn])]
        return found

    @property
    def tokens(self) -> int:
        """Input tokens of a run."""
        return self.steps * self.size.tokens_per_step

    def recipe(self, variant: Variant, seed: int) -> Recipe:
        """The recipe of one run; `seed` sets initial weights and data order."""
        return parse_recipe(
            self.raw_recipe(variant, seed), origin=f"study {self.kind}, variant {variant.name}"
        )

    def raw_recipe(self, variant: Variant, seed: int) -> dict[str, Any]:
        """The recipe as a TOML table."""
        size, steps = self.size, self.steps
        warm_up, fall = max(1, round(steps * WARM_UP)), max(1, round(steps * FALL))
        peak = size.learning_rate
        segments = [{"to": peak, "steps": min(warm_up, steps)}]
        if steps > warm_up + fall:
            segments.append({"to": peak, "steps": steps - warm_up - fall})
        if steps > warm_up:
            segments.append({"to": peak * LAST_RATE})
        return {
            "name": f"{self.kind}-{variant.name}-{seed}",
            "seed": seed,
            "precision": variant.precision,
            "data": {"folder": str(self.data)},
            "optimizer": {"name": OPTIMIZER},
            "balance": {"sequence_weight": variant.sequence_weight},
            "checkpoints": {"every_steps": max(1, -(-steps // CHECKPOINTS))},
            "evaluation": {"every_steps": max(1, steps // 10), "sequences": 32},
            "log": {"tensorboard": False},
            "model": variant.model,
            "phase": [
                {
                    "name": "train",
                    "steps": steps,
                    "sequence_length": size.sequence_length,
                    "batch_size": size.batch_size,
                    "micro_batch_size": size.micro_batch_size,
                    "learning_rate": segments,
                    "bias_update_speed": variant.bias_update_speed,
                }
            ],
        }


def model_table(
    size: StudySize, attention: dict[str, Any], intermediate_size: int
) -> dict[str, Any]:
    """The [model] table of a dense model of `size`."""
    return {
        "model_type": "lowlat",
        "hidden_size": size.hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": size.num_hidden_layers,
        "max_position_embeddings": max(size.decode_contexts) + SPARE_CONTEXT,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "attention": attention,
        "rope": {"rope_theta": 10000.0},
    }


def config_of(model: dict[str, Any], vocab_size: int) -> ModelConfig:
    """The config of a [model] table with `vocab_size` tokens."""
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


def choose_variants(variants: Sequence[Variant], names: str | None) -> tuple[Variant, ...]:
    """The variants named in `names` ('mha,mla'), in the order of `variants`; None: all.

    Raises UserError for an unknown name, and if the baseline (the first) is missing or alone.
    """
    if names is None:
        return tuple(variants)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = [variant.name for variant in variants]
    for name in wanted:
        if name not in known:
            raise UserError(f"--variants: '{name}' is unknown; choose from {', '.join(known)}")
    if known[0] not in wanted or len(set(wanted)) < 2:
        raise UserError(f"--variants {names}: give {known[0]}, the baseline, and one more at least")
    return tuple(variant for variant in variants if variant.name in wanted)


def num_steps(size: StudySize, *, steps: int | None, tokens: int | None) -> int:
    """Steps of a run: `steps`, or about `tokens` of training, or the size's default.

    Raises UserError if both are given.
    """
    if steps is not None and tokens is not None:
        raise UserError("--steps and --tokens exclude each other; give one of them")
    if tokens is not None:
        return max(1, round(tokens / size.tokens_per_step))
    return size.steps if steps is None else steps


def open_data(folder: Path, size: StudySize) -> TokenizedDataset:
    """The tokenized dataset of a study. Raises UserError as `TokenizedDataset.open`, or if too few
    tokens are held out.
    """
    opened = TokenizedDataset.open(folder.resolve())
    least = size.sequence_length + 3
    if opened.num_tokens("held_out") < least:
        raise UserError(
            f"{folder}: holds {opened.num_tokens('held_out')} held-out tokens, and a window needs "
            f"{least}; build it again with more documents held out"
        )
    return opened
