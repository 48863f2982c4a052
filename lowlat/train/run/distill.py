"""Distillation of an original model into a converted one (recovery training), in one call.

Chooses a training recipe for the number of tokens and runs the trainer on it. Called again with the
same arguments it resumes from the last checkpoint, or returns the finished result.
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
from lowlat.train.metrics.jsonl import RunHistory, read_log
from lowlat.train.metrics.live_view import make_view
from lowlat.train.metrics.metrics_log import FolderMetricsLog
from lowlat.train.metrics.record import EvalRecord
from lowlat.train.recipe.schema import parse_recipe
from lowlat.train.recipe.toml import to_toml
from lowlat.train.run.trainer import Trainer
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress

SEQUENCE_LENGTH = 1024
"""Tokens of a sequence: the error of reduced rotary channels grows with distance."""
BATCH_TOKENS = 1024
"""Tokens per step. For a given budget, more steps help most (docs/results/conversion.md)."""
LEARNING_RATE = 2e-4
"""Peak for models of a few hundred million parameters; Muon's updates are as large as AdamW's."""
FULL_STEPS = 100
"""Runs of fewer steps have a proportionally lower peak: AdamW's first steps change every weight by
the full learning rate, which a short run cannot correct.
"""
WARM_UP, WARM_UP_STEPS = 0.05, 10
"""Share of warm-up steps, and their largest number."""
DECAY, END = 0.9, 0.02
"""Share of decay steps, and the final learning rate over its peak. Small batches are noisy, so a
long decay beats a long peak.
"""
LAYER_SHARE, LAYER_STEPS = 0.2, 20
"""Share and largest number of the first steps, which match attention outputs layer by layer; the
other steps match next-token distributions. A layer-wise step computes neither MLPs nor the head: it
takes 0.6 of the time and helps as much.
"""
EVALUATIONS, EVALUATED_TOKENS = 2, 16_384
"""Number of evaluations after the initial one, and held-out tokens of each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillationOptions:
    """Settings; the defaults suit SmolLM2-135M on two CPU cores."""

    tokens: int
    """Training tokens, rounded to whole steps."""
    sequence_length: int = SEQUENCE_LENGTH
    batch_tokens: int | None = None
    """Tokens of a step; None: BATCH_TOKENS."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float | None = None
    """Peak; None: LEARNING_RATE, less for fewer than FULL_STEPS steps."""
    layer_share: float | None = None
    """Share of the steps that match layer by layer; None: LAYER_SHARE, at most LAYER_STEPS."""
    cross_entropy: float = 0.0
    """Weight of the cross-entropy loss."""
    trainable: Literal["all", "attention"] = "attention"
    precision: Literal["fp32", "bf16"] = "bf16"
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillationResult:
    """Result of a distillation."""

    model: Path
    """The trained model, a Hugging Face folder."""
    before: EvalRecord
    """Held-out loss and divergence before the first step."""
    after: EvalRecord
    """The same after the last."""
    evaluations: tuple[EvalRecord, ...]
    """All of them, from `before` to `after`."""
    tokens: int
    """Training tokens."""
    seconds: float
    """Of steps and evaluations, over all calls."""


def distillation_recipe(
    student: Path, teacher: Path, tokens: Path, options: DistillationOptions
) -> dict[str, Any]:
    """The raw recipe of `distill`, with absolute paths."""
    length = options.sequence_length
    rows = max(1, round((options.batch_tokens or BATCH_TOKENS) / length))
    steps = max(1, round(options.tokens / (rows * length)))
    if options.layer_share is None:
        layers = min(LAYER_STEPS, round(LAYER_SHARE * steps))
    else:
        layers = round(options.layer_share * steps)
    peak = options.learning_rate or LEARNING_RATE * min(1.0, steps / FULL_STEPS)
    phases = [("layers", "attention", layers), ("logits", "logits", steps - layers)]
    return {
        "name": "distillation",
        "seed": options.seed,
        "base_model": str(student.absolute()),
        "precision": options.precision,
        "device": options.device,
        "trainable": options.trainable,
        "distillation": {
            "teacher": str(teacher.absolute()),
            "cross_entropy_weight": options.cross_entropy,
        },
        "data": {"folder": str(tokens.absolute())},
        "optimizer": {"name": options.optimizer, "weight_decay": 0.0},
        "phase": [
            {
                "name": name,
                "match": match,
                "steps": count,
                "sequence_length": length,
                "batch_size": rows,
                "micro_batch_size": 2 - rows % 2,
                "learning_rate": schedule(peak, count),
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


def distill(
    student: Path,
    teacher: Path,
    tokens: Path,
    out: Path,
    options: DistillationOptions,
    *,
    quiet: bool = False,
    progress: Progress | None = None,
) -> DistillationResult:
    """Distill the checkpoint `teacher` into the checkpoint `student` (folders or .gguf files) on
    the tokenized dataset `tokens`, in the run folder `out`.

    Raises UserError as the trainer, if `tokens` has no held-out split, and if `out` holds a run
    with other arguments; KeyboardInterrupt, after a checkpoint, if SIGINT or SIGTERM stops the run.
    """
    check_distillation(tokens, options)
    raw = distillation_recipe(student, teacher, tokens, options)
    model, history = run_recipe(raw, out, student, teacher, quiet=quiet, progress=progress)
    return DistillationResult(
        model=model,
        before=history.evaluations[0],
        after=history.evaluations[-1],
        evaluations=tuple(history.evaluations),
        tokens=history.steps[-1].tokens,
        seconds=history.steps[-1].seconds,
    )


def run_recipe(
    raw: dict[str, Any],
    out: Path,
    student: Path,
    teacher: Path | None = None,
    *,
    quiet: bool = False,
    progress: Progress | None = None,
) -> tuple[Path, RunHistory]:
    """Run the generated recipe `raw` from the checkpoint `student` to its end in the run folder
    `out`: the trained model, and the log. Errors as of `distill`.
    """
    recipe = parse_recipe(raw, origin=raw["name"])
    with RunFolder(out) as run:
        log = FolderMetricsLog(run, view=make_view(quiet=quiet), tensorboard_wanted=False)
        with closing(log):
            trainer = Trainer(
                recipe,
                run,
                log,
                base=Path("/"),
                base_model=student,
                teacher=teacher,
                origin=raw["name"],
                progress=progress,
            )
            run.write_recipe(to_toml(raw))
            outcome = trainer.run()
    if outcome.model is None:
        raise KeyboardInterrupt
    return outcome.model, read_log(run.log)


def check_distillation(
    tokens: Path, options: DistillationOptions, *, origin: str | None = None
) -> None:
    """Raises UserError if the tokenized dataset `tokens` does not suit `options`. origin: its name
    in messages.
    """
    folder, length = TokenizedDataset.open(tokens), options.sequence_length
    origin = origin or str(tokens)
    if folder.num_tokens("held_out") <= length:
        raise UserError(
            f"{origin}: has {folder.num_tokens('held_out')} held-out tokens, at least {length + 1} "
            "are needed; build it again with more documents held out"
        )
    if options.tokens < length:
        raise UserError(
            f"{options.tokens} training tokens are less than a sequence of {length}; give more"
        )
    if options.layer_share is not None and not 0 <= options.layer_share <= 1:
        raise UserError(f"layer_share is {options.layer_share} and must be 0 to 1")
    recipe = parse_recipe(
        distillation_recipe(tokens, tokens, tokens, options), origin="distillation"
    )
    data = phase_data(recipe, len(recipe.phase) - 1, folder, num_ahead=1)
    rows = {"for training": data.train, "held out for evaluation": data.held_out}
    for what, found in rows.items():
        if found is None or not found.has_targets():
            raise UserError(
                f"{origin}: no answer {what} is within the first {length} tokens of its chat, "
                "where chats are cut; give shorter chats, or text"
            )


def check_memory(original: ModelConfig, student: ModelConfig, options: DistillationOptions) -> None:
    """Raises UserError if distilling `original` into a model like `student` needs more memory than
    the machine has.
    """
    here = Path(".")
    recipe = parse_recipe(distillation_recipe(here, here, here, options), origin="distillation")
    available = usable_memory(torch.device(recipe.device), recipe.parallel.processes)
    needed = needed_bytes(most_memory(student, recipe, teacher=original)[1])
    if needed > available:
        raise UserError(
            f"--heal: training needs about {gigabytes(needed)} of memory, {gigabytes(available)} "
            "are available; convert without --heal, or on a machine with more"
        )


def schedule(peak: float, steps: int) -> list[dict[str, Any]]:
    """Warmup-stable-decay (WSD) schedule: linear warmup, a constant peak, linear decay."""
    warm = max(1, min(WARM_UP_STEPS, round(WARM_UP * steps)))
    held = max(0, steps - warm - round(DECAY * steps))
    segments: list[dict[str, Any]] = [{"to": peak, "steps": warm}]
    if held:
        segments.append({"to": peak, "shape": "constant", "steps": held})
    if warm + held < steps:
        segments.append({"to": END * peak})
    return segments
