"""Plan of the GRPO study: experiments, variants of the trainer, and the recipe of every run."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowlat.utils.errors import UserError
from lowlat_lab.rewards.tasks import HELD_OUT, PROMPTS, TASKS, RewardTask


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerVariant:
    """Arithmetic of the trainer's forward pass."""

    name: str
    label: str
    uses_transformers: bool = False
    importance_sampling_clip_max: float | None = None


EXACT = TrainerVariant(name="exact", label="engine's kernels")
TRANSFORMERS = TrainerVariant(
    name="transformers", label="transformers' forward", uses_transformers=True
)
CORRECTED = replace(
    TRANSFORMERS,
    name="transformers-tis",
    label="transformers' forward, TIS",
    importance_sampling_clip_max=2.0,
)
"""Truncated importance sampling with the usual bound."""
VARIANTS = (EXACT, TRANSFORMERS, CORRECTED)


@dataclass(frozen=True, kw_only=True, slots=True)
class FineTuning:
    """Supervised fine-tuning on solved examples before GRPO."""

    steps: int
    batch_size: int = 8
    sequence_length: int = 256
    learning_rate: float = 2e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """Runs of one model on one task."""

    model: str
    """Name or path of the checkpoint."""
    task: str
    seeds: int
    variants: tuple[TrainerVariant, ...] = (EXACT,)
    fine_tuning: FineTuning | None = None
    steps: int = 24
    batch_size: int = 32
    """Completions per step."""
    num_generations: int = 8
    """Completions per prompt."""
    micro_batch_size: int = 16
    learning_rate: float = 5e-5
    evaluate_every: int = 12
    held_out: int = 96
    """Held-out prompts."""
    held_out_samples: int = 2
    """Completions per held-out prompt."""
    pass_at: tuple[int, ...] = (1,)

    @property
    def name(self) -> str:
        """Name of its folder, and for --experiments."""
        return f"{Path(self.model).name}-{self.task}"

    def run_name(self, variant: TrainerVariant) -> str:
        """Name of the runs of `variant`."""
        return f"{self.name}/{variant.name}"

    @property
    def reward_task(self) -> RewardTask:
        return TASKS[self.task]

    def recipe(self, variant: TrainerVariant, seed: int) -> dict[str, Any]:
        """The recipe of one run as a TOML table, relative to the experiment's folder; `seed` sets
        the order of prompts and all random numbers.
        """
        task = self.reward_task
        return {
            "name": f"rewards-{self.name}-{variant.name}-{seed}",
            "seed": seed,
            "base_model": self.model if self.fine_tuning is None else "sft/model",
            "optimizer": {"weight_decay": 0.0},
            "balance": {"sequence_weight": 0.0},
            "checkpoints": {"every_steps": self.evaluate_every},
            "log": {"tensorboard": False},
            "evaluation": {
                "every_steps": self.evaluate_every,
                "prompts": HELD_OUT,
                "num_generations": self.held_out_samples,
                "pass_at": list(self.pass_at),
            },
            "phase": [
                {
                    "name": "grpo",
                    "steps": self.steps,
                    "sequence_length": task.sequence_length,
                    "batch_size": self.batch_size,
                    "micro_batch_size": self.micro_batch_size,
                    "learning_rate": self.learning_rate,
                    "mtp_weight": 0.0,
                    "bias_update_speed": 0.0,
                    "grpo": {
                        "prompts": PROMPTS,
                        "reward_funcs": [task.reward],
                        "num_generations": self.num_generations,
                        "max_completion_length": task.max_completion_length,
                    },
                }
            ],
        }

    def fine_tuning_recipe(self) -> dict[str, Any]:
        """The recipe of the model that all runs start from, relative to the experiment's folder."""
        own = self.fine_tuning
        assert own is not None
        rise = {"to": own.learning_rate, "steps": min(5, own.steps - 1)}
        fall = {"to": own.learning_rate / 20, "shape": "cosine"}
        return {
            "name": f"rewards-{self.name}-sft",
            "base_model": self.model,
            "data": {"folder": "sft-tokens", "document_masks": True},
            "optimizer": {"name": "muon", "weight_decay": 0.0},
            "checkpoints": {"every_steps": 50},
            "log": {"tensorboard": False},
            "phase": [
                {
                    "name": "sft",
                    "steps": own.steps,
                    "sequence_length": own.sequence_length,
                    "batch_size": own.batch_size,
                    "micro_batch_size": own.batch_size,
                    "learning_rate": [rise, fall],
                    "mtp_weight": 0.0,
                    "bias_update_speed": 0.0,
                }
            ],
        }


EXPERIMENTS = (
    Experiment(
        model="minnow",
        task="letter_counting",
        seeds=5,
        variants=VARIANTS,
        learning_rate=1e-4,
        fine_tuning=FineTuning(steps=30),
    ),
    Experiment(
        model="minnow",
        task="gcd",
        seeds=5,
        learning_rate=1e-4,
        fine_tuning=FineTuning(steps=30),
    ),
    Experiment(
        model="minnow",
        task="chain_sum",
        seeds=5,
        steps=60,
        learning_rate=1e-4,
        evaluate_every=30,
        fine_tuning=FineTuning(steps=200),
    ),
    Experiment(
        model="default",
        task="two_term_sum",
        seeds=3,
        steps=12,
        learning_rate=5e-5,
        held_out=48,
    ),
    Experiment(
        model="default",
        task="gsm8k",
        seeds=1,
        steps=6,
        learning_rate=1e-5,
        evaluate_every=6,
        held_out=40,
        held_out_samples=8,
        pass_at=(1, 8),
    ),
)
"""In order: the first ones are complete first."""


def choose_experiments(names: str | None) -> tuple[Experiment, ...]:
    """The experiments named in `names` ('minnow-chain_sum,default-gsm8k'); None: all. Raises
    UserError for an unknown name.
    """
    known = {each.name: each for each in EXPERIMENTS}
    if names is None:
        return EXPERIMENTS
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            raise UserError(f"--experiments: '{name}' is unknown; choose from {', '.join(known)}")
    return tuple(each for each in EXPERIMENTS if each.name in wanted)


def runs_of(experiment: Experiment) -> Iterator[tuple[TrainerVariant, int]]:
    """All runs in order: those of the first variant, then the ablation seed by seed."""
    first, *others = experiment.variants
    seeds = range(1, experiment.seeds + 1)
    yield from ((first, seed) for seed in seeds)
    yield from ((variant, seed) for seed in seeds for variant in others)
