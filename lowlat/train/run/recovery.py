"""Healing: a converted model distilled against the one it was made from, in one call.

Owns the recipe that suits it and what is told afterwards; the training is `trainer`'s, so called
again with the same arguments it goes on from its last save, or returns what is done.
"""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lowlat.config.model import ModelConfig
from lowlat.data.dataset import TokenizedDataset
from lowlat.train.checkpoints.run_folder import RunFolder
from lowlat.train.cost.dry_run import gigabytes, most_memory, needed_bytes, usable_memory
from lowlat.train.inputs.phase_data import phase_data
from lowlat.train.metrics.jsonl import read_log
from lowlat.train.metrics.metrics_log import FolderMetricsLog
from lowlat.train.metrics.progress_view import make_view
from lowlat.train.metrics.record import EvalRecord
from lowlat.train.recipe.schema import parse_recipe
from lowlat.train.recipe.toml import to_toml
from lowlat.train.run.trainer import Trainer
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress

SEQUENCE_LENGTH = 1024
"""Tokens of a row: what was cut from rotary parts shows at long distances."""
BATCH_TOKENS = 1024
"""Of a step: what a budget needs most is steps. SmolLM2-135M with a third of its cache goes on 100K
tokens from a held-out divergence of 0.545 to 0.352, and to 0.384 in half as many steps of twice the
tokens.
"""
LEARNING_RATE = 2e-4
"""Peak, for models of a few hundred million parameters; Muon's updates are as large as AdamW's. In
16 steps of 2,048 tokens SmolLM2-135M with half its cache goes from a held-out divergence of 0.220
to 0.190 at 1e-4 and to 0.226 at 3e-4; in 64 steps at 1.5e-4 to 0.158.
"""
FULL_STEPS = 100
"""A run of fewer steps has a peak as much lower: AdamW's first steps move every weight by the whole
rate, and a short run has no time to mend that.
"""
WARM_UP, WARM_UP_STEPS = 0.05, 10
"""Share of the steps that warms up, and how many steps at most."""
DECAY, END = 0.9, 0.02
"""Share of the steps in which the rate falls from its peak, and to which share of it. Steps this
small are noisy, and what a falling rate takes out of them is worth more than a peak held: 200K
tokens end at a divergence of 0.131, and of 0.134 where the rate falls in the last 0.3.
"""
LAYER_SHARE, LAYER_STEPS = 0.2, 20
"""Share of the steps that match layer by layer before the rest matches distributions, and how many
at most. Such a step takes six tenths of the time, having neither MLPs nor a head, and is worth as
much as the one it takes the place of: 100K tokens end at a divergence of 0.3189 with 20 and of
0.3195 without, a third of the cache kept.
"""
EVALUATIONS, EVALUATED_TOKENS = 2, 16_384
"""During a healing beside that before it, and held-out tokens of each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoveryOptions:
    """How to heal; the defaults suit SmolLM2-135M on two cores."""

    tokens: int
    """Training tokens to read, rounded to whole steps."""
    sequence_length: int = SEQUENCE_LENGTH
    batch_tokens: int | None = None
    """Tokens of a step; BATCH_TOKENS unless given."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float | None = None
    """Peak; LEARNING_RATE unless given, less where there are fewer than FULL_STEPS."""
    layer_share: float | None = None
    """Share of the steps that match layer by layer first; LAYER_SHARE unless given, and then at
    most LAYER_STEPS of them.
    """
    cross_entropy: float = 0.0
    """Weight of the ordinary loss."""
    trainable: Literal["all", "attention"] = "attention"
    precision: Literal["fp32", "bf16"] = "bf16"
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoveryResult:
    """What came of it."""

    model: Path
    """The healed model in the Hugging Face layout."""
    before: EvalRecord
    """Held-out loss and divergence before the first step."""
    after: EvalRecord
    """The same after the last."""
    evaluations: tuple[EvalRecord, ...]
    """All of them, from `before` to `after`."""
    tokens: int
    """Training tokens read."""
    seconds: float
    """Of steps and evaluations, over all calls."""


def recovery_recipe(
    student: Path, teacher: Path, tokens: Path, healing: RecoveryOptions
) -> dict[str, Any]:
    """The raw recipe of `heal`; all paths are absolute in it."""
    length = healing.sequence_length
    rows = max(1, round((healing.batch_tokens or BATCH_TOKENS) / length))
    steps = max(1, round(healing.tokens / (rows * length)))
    if healing.layer_share is None:
        layers = min(LAYER_STEPS, round(LAYER_SHARE * steps))
    else:
        layers = round(healing.layer_share * steps)
    peak = healing.learning_rate or LEARNING_RATE * min(1.0, steps / FULL_STEPS)
    phases = [("layers", "attention", layers), ("heal", "logits", steps - layers)]
    return {
        "name": "heal",
        "seed": healing.seed,
        "base_model": str(student.absolute()),
        "precision": healing.precision,
        "device": healing.device,
        "trainable": healing.trainable,
        "distillation": {
            "teacher": str(teacher.absolute()),
            "cross_entropy_weight": healing.cross_entropy,
        },
        "data": {"folder": str(tokens.absolute())},
        "optimizer": {"name": healing.optimizer, "weight_decay": 0.0},
        "phase": [
            {
                "name": name,
                "match": match,
                "steps": count,
                "sequence_length": length,
                "batch_size": rows,
                "micro_batch_size": 2 - rows % 2,
                "learning_rate": _schedule(peak, count),
                "bias_update_speed": 0.0,
            }
            for name, match, count in phases
            if count
        ],
        "checkpoints": {"every_steps": max(1, min(50, steps // 4))},
        "evaluation": {
            "every_steps": max(1, -(-steps // EVALUATIONS)),
            "sequences": max(1, EVALUATED_TOKENS // length),
        },
    }


def train_recovery(
    student: Path,
    teacher: Path,
    tokens: Path,
    out: Path,
    healing: RecoveryOptions,
    *,
    quiet: bool = False,
    progress: Progress | None = None,
) -> RecoveryResult:
    """Train the checkpoint `student` to say what the checkpoint `teacher` says (folders or .gguf
    files), on the token folder `tokens`, in the run's folder `out`.

    Raises UserError as the trainer, where `tokens` holds nothing out to measure on, and where `out`
    holds a run with other arguments; KeyboardInterrupt after a save where the run was asked to stop
    by SIGINT or SIGTERM.
    """
    check_recovery_data(tokens, healing)
    raw = recovery_recipe(student, teacher, tokens, healing)
    recipe = parse_recipe(raw, origin="healing")
    with RunFolder(out) as run:
        log = FolderMetricsLog(
            log=run.log,
            tensorboard_folder=run.tensorboard,
            view=make_view(quiet=quiet),
            tensorboard_wanted=False,
        )
        with closing(log):
            trainer = Trainer(
                recipe,
                run,
                log,
                base=Path("/"),
                base_model=student,
                teacher=teacher,
                origin="healing",
                progress=progress,
            )
            run.write_recipe(to_toml(raw))
            outcome = trainer.run()
    if outcome.model is None:
        raise KeyboardInterrupt
    history = read_log(run.log)
    return RecoveryResult(
        model=outcome.model,
        before=history.evaluations[0],
        after=history.evaluations[-1],
        evaluations=tuple(history.evaluations),
        tokens=history.steps[-1].tokens,
        seconds=history.steps[-1].seconds,
    )


def check_recovery_data(
    tokens: Path, healing: RecoveryOptions, *, origin: str | None = None
) -> None:
    """Raises UserError where the token folder `tokens`, in errors called `origin`, cannot be healed
    on as `healing` says.
    """
    folder, length = TokenizedDataset.open(tokens), healing.sequence_length
    origin = origin or str(tokens)
    if folder.num_tokens("held_out") <= length:
        raise UserError(
            f"{origin}: holds {folder.num_tokens('held_out')} held-out tokens, and healing is "
            f"measured on {length + 1} at least; build it again with more documents held out"
        )
    if healing.tokens < length:
        raise UserError(
            f"healing on {healing.tokens} tokens is less than a row of {length}; ask for more"
        )
    if healing.layer_share is not None and not 0 <= healing.layer_share <= 1:
        raise UserError(f"the share of layer by layer, {healing.layer_share}, must be 0 to 1")
    recipe = parse_recipe(recovery_recipe(tokens, tokens, tokens, healing), origin="healing")
    data = phase_data(recipe, len(recipe.phase) - 1, folder, num_ahead=1)
    rows = {"to train on": data.train, "held out to measure on": data.held_out}
    for what, found in rows.items():
        if found is None or not found.has_targets():
            raise UserError(
                f"{origin}: no answer {what} is within the first {length} tokens of its chat, "
                "which is as far as chats are read; give shorter chats, or text"
            )


def check_recovery_memory(
    original: ModelConfig, student: ModelConfig, healing: RecoveryOptions
) -> None:
    """Raises UserError where training a model like `student` against `original` takes more memory
    than there is.
    """
    here = Path(".")
    recipe = parse_recipe(recovery_recipe(here, here, here, healing), origin="healing")
    there = usable_memory(torch.device(recipe.device), recipe.parallel.processes)
    needed = needed_bytes(most_memory(student, recipe, teacher=original)[1])
    if needed > there:
        raise UserError(
            f"--heal: training needs about {gigabytes(needed)} of memory and {gigabytes(there)} "
            "are there; convert without --heal, or where there is more"
        )


def _schedule(peak: float, steps: int) -> list[dict[str, Any]]:
    """Warm-up, the peak, and a straight fall."""
    warm = max(1, min(WARM_UP_STEPS, round(WARM_UP * steps)))
    held = max(0, steps - warm - round(DECAY * steps))
    segments: list[dict[str, Any]] = [{"to": peak, "steps": warm}]
    if held:
        segments.append({"to": peak, "shape": "constant", "steps": held})
    if warm + held < steps:
        segments.append({"to": END * peak})
    return segments
