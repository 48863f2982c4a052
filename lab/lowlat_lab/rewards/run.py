"""Runs of the GRPO study: prompts, supervised fine-tuning, GRPO runs; resumable.

OUT/EXPERIMENT/                           prompt files
OUT/EXPERIMENT/sft/model                  what all runs start from
OUT/EXPERIMENT/VARIANT/seed-N/            run folder of `lowlat train`
OUT/EXPERIMENT/VARIANT/seed-N/result.json present once the run is finished
"""

import json
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from lowlat import api
from lowlat.data.build import build
from lowlat.data.selection import BuildOptions
from lowlat.data.vocabulary import load_tokenizer
from lowlat.train.checkpoints.run_folder import RunFolder
from lowlat.train.metrics.jsonl import RunHistory, read_log
from lowlat.train.metrics.metrics_log import FolderMetricsLog
from lowlat.train.recipe.schema import parse_recipe
from lowlat.train.recipe.toml import to_toml
from lowlat.train.run.trainer import MODEL_FOLDER, Trainer
from lowlat.utils.atomic_files import make_folder, replace_file
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress
from lowlat_lab.rewards.plan import Experiment, TrainerVariant, runs_of
from lowlat_lab.rewards.tasks import CHATS, write_files, write_gsm8k
from lowlat_lab.rewards.transformers_forward import TransformersForward
from lowlat_lab.study.resumable import (
    Result,
    Stopped,
    StudyRun,
    TaskView,
    write_result,
)

SFT = "sft"
SECONDS = "seconds.json"
"""Processor seconds of a run folder so far."""


def study_runs(experiment: Experiment, out: Path, gsm8k: Path | None = None) -> list[StudyRun]:
    """All runs of `experiment`, in order. gsm8k: folder of GSM8K's files."""
    folder = out / experiment.name
    return [
        StudyRun(
            variant=experiment.run_name(variant),
            seed=seed,
            folder=folder / variant.name / f"seed-{seed}",
            identity=_identity(experiment, variant, seed),
            run=partial(_run, experiment, variant, seed, folder, gsm8k),
        )
        for variant, seed in runs_of(experiment)
    ]


def _identity(experiment: Experiment, variant: TrainerVariant, seed: int) -> dict[str, Any]:
    """What determines a run, as JSON values."""
    task = experiment.reward_task
    settings = {
        "recipe": experiment.recipe(variant, seed),
        "variant": asdict(variant),
        "task": dict(task.settings or {}),
        "held_out": experiment.held_out,
    }
    if experiment.fine_tuning is not None:
        settings["fine_tuning"] = experiment.fine_tuning_recipe()
    return json.loads(json.dumps(settings))


def _run(
    experiment: Experiment,
    variant: TrainerVariant,
    seed: int,
    folder: Path,
    gsm8k: Path | None,
    progress: Progress,
) -> Result:
    """Train, write the result, and remove training checkpoints and model."""
    base = base_model(experiment, folder, progress, gsm8k=gsm8k)
    raw = experiment.recipe(variant, seed)
    with RunFolder(folder / variant.name / f"seed-{seed}") as run:
        with (
            progress.task(f"{experiment.name}, {variant.name}, seed {seed}", experiment.steps) as t,
            closing(FolderMetricsLog(run, view=TaskView(t), tensorboard_wanted=False)) as log,
            processor_seconds(run.path),
        ):
            run.write_recipe(to_toml(raw))
            recipe = parse_recipe(raw, origin=raw["name"])
            trainer = Trainer(recipe, run, log, base=folder, base_model=base, origin=raw["name"])
            forward = use_variant(trainer, variant, base)
            outcome = trainer.run()
        if outcome.model is None:
            raise Stopped
        result = figures_of(read_log(run.log))
        result["cpu_seconds"] = read_seconds(run.path)
        result["fine_tuning_cpu_seconds"] = read_seconds(folder / SFT)
        if forward is not None:
            result["mismatch_means"] = forward.mismatch.means()
        result = write_result(run.path, _identity(experiment, variant, seed), result)
        shutil.rmtree(run.checkpoints)
        shutil.rmtree(outcome.model)
    return result


def use_variant(
    trainer: Trainer, variant: TrainerVariant, base: Path
) -> TransformersForward | None:
    """Give `trainer` the arithmetic of `variant`; returns its forward pass unless it is lowlat's.
    base: folder of the base model.
    """
    assert trainer.grpo is not None
    learner = trainer.grpo.learner
    learner.options = replace(
        learner.options, importance_sampling_clip_max=variant.importance_sampling_clip_max
    )
    if not variant.uses_transformers:
        return None
    learner.forward = forward = TransformersForward(base, learner)
    return forward


def base_model(
    experiment: Experiment, folder: Path, progress: Progress, *, gsm8k: Path | None = None
) -> Path:
    """Write the prompts of `experiment`, and fine-tune its model if it asks for that. Returns the
    model that runs start from.
    """
    make_folder(folder)
    if experiment.reward_task.settings is not None:
        write_files(experiment.reward_task, folder, num_held_out=experiment.held_out)
    elif gsm8k is None:
        raise UserError(f"--gsm8k is missing; {experiment.name} needs the folder of its files")
    else:
        write_gsm8k(gsm8k, folder, num_held_out=experiment.held_out)
    model = api.prepare(experiment.model, progress=progress)
    if experiment.fine_tuning is None:
        return model
    done = folder / SFT / MODEL_FOLDER
    if not done.exists():
        _fine_tune(experiment, folder, model, progress)
    return done


def _fine_tune(experiment: Experiment, folder: Path, model: Path, progress: Progress) -> None:
    raw = experiment.fine_tuning_recipe()
    recipe = parse_recipe(raw, origin=raw["name"])
    tokens = folder / raw["data"]["folder"]
    if not tokens.exists():
        options = BuildOptions(sources=(str(folder / CHATS),))
        build(tokens, options, load_tokenizer(experiment.model, progress), progress)
    with (
        RunFolder(folder / SFT) as run,
        progress.task(f"{experiment.name}, fine-tuning", recipe.phase[0].steps) as task,
        closing(FolderMetricsLog(run, view=TaskView(task), tensorboard_wanted=False)) as log,
        processor_seconds(run.path),
    ):
        trainer = Trainer(
            recipe, run, log, base=folder, base_model=model, origin=recipe.name, progress=progress
        )
        run.write_recipe(to_toml(raw))
        if trainer.run().model is None:
            raise Stopped
        shutil.rmtree(run.checkpoints)


@contextmanager
def processor_seconds(folder: Path) -> Iterator[None]:
    """Add the processor time of this process and of those that ended meanwhile to SECONDS in
    `folder`.
    """
    before = _used()
    try:
        yield
    finally:
        total = read_seconds(folder) + _used() - before
        replace_file(folder / SECONDS, json.dumps(total).encode())


def read_seconds(folder: Path) -> float:
    """Processor seconds spent in a run folder; 0 if it has none."""
    file = folder / SECONDS
    return float(json.loads(file.read_bytes())) if file.exists() else 0.0


def _used() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def figures_of(history: RunHistory) -> dict[str, Any]:
    """Curves of a run from its log."""
    rollouts = [step.rollouts for step in history.steps if step.rollouts is not None]
    evaluations = [each for each in history.evaluations if each.pass_at_k is not None]
    return {
        "steps": history.steps[-1].step,
        "seconds": history.steps[-1].seconds,
        "reward": [round(own.reward, 6) for own in rollouts],
        "length": [own.length for own in rollouts],
        "entropy": [round(own.entropy, 6) for own in rollouts],
        "no_signal": [own.no_signal for own in rollouts],
        "mismatch": [own.mismatch for own in rollouts if own.mismatch is not None],
        "evaluations": [
            {"step": each.step, "pass_at": own.pass_at, "stderr": own.stderr}
            for each in evaluations
            if (own := each.pass_at_k) is not None
        ],
    }
