"""Training loop: resume, optimizer steps, evaluation, checkpoints, phase changes, final export."""

import gc
import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

from lowlat.config.model import ModelConfig
from lowlat.data.batch import Batch
from lowlat.data.packing import PackedRows
from lowlat.model.transformer import Transformer
from lowlat.plan.rate import measure_gemm_rate
from lowlat.train.checkpoints.checkpoint import TrainingCheckpoint
from lowlat.train.checkpoints.run_folder import RunFolder
from lowlat.train.checkpoints.store import CheckpointStore
from lowlat.train.cost.frozen_weights import training_flops
from lowlat.train.inputs.phase_data import PhaseData
from lowlat.train.inputs.run_inputs import open_run_inputs
from lowlat.train.metrics.metrics_log import MetricsLog
from lowlat.train.metrics.record import RolloutRecord
from lowlat.train.parallel.mesh import ProcessMesh
from lowlat.train.recipe.schedule import StepPlan, TrainingSchedule
from lowlat.train.recipe.schema import Recipe
from lowlat.train.run.build import DTYPES, new_model, new_passes, new_teacher
from lowlat.train.run.export import TOKENIZER, export, keep_tokenizer, refuse_older_model
from lowlat.train.run.failed_step import batch_file, keep_batch
from lowlat.train.run.grpo import begins_with_evaluation, grpo_phase, pass_at_k_record
from lowlat.train.run.signals import StopSignals
from lowlat.train.run.state import (
    MODEL,
    OPTIMIZER,
    RANDOM,
    ROLLOUTS,
    Position,
    check_config,
    check_resumable,
    facts,
    part,
    snapshot,
    state_tensors,
)
from lowlat.train.run.step_records import StepRecorder, eval_record, start_record
from lowlat.train.step.balance import LoadBalancer
from lowlat.train.step.indexers import IndexerLosses
from lowlat.train.step.lora import merged
from lowlat.train.step.optim import Optimizer
from lowlat.train.step.step import StepResult, evaluate, train_step
from lowlat.train.step.teacher import Teacher
from lowlat.utils.errors import UserError
from lowlat.utils.memory import retain_freed_memory
from lowlat.utils.progress import Progress, SilentProgress

MODEL_FOLDER = "model"
"""Folder of the finished model in the run folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingResult:
    """Result of `Trainer.run`."""

    step: int
    """Completed optimizer steps."""
    is_complete: bool
    """Whether the recipe is finished; otherwise a signal stopped the run, which can resume."""
    losses: tuple[float, ...]
    """Losses of the last step: main head, then MTP modules, nats per token; empty without a step.
    """
    model: Path | None
    """The finished model in the Hugging Face layout."""


class Trainer:
    """One run of a recipe in a folder that this process holds."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunFolder,
        log: MetricsLog,
        *,
        base: Path,
        base_model: Path | None = None,
        teacher: Path | None = None,
        origin: str = "recipe",
        progress: Progress | None = None,
        mesh: ProcessMesh | None = None,
    ) -> None:
        """Open the data and build the model, from the latest checkpoint in the folder if any.

        base: folder that relative paths of the recipe start from; base_model, teacher: files of
        recipe.base_model and recipe.distillation; origin: the recipe's name in errors; mesh: the
        processes of the run, of which rank 0 holds the folder and has a log. Raises UserError for
        corrupt data, for a recipe that differs from that of the checkpoint, and as `build`.
        """
        progress = progress or SilentProgress()
        self._mesh = mesh = mesh or ProcessMesh()
        self.recipe = recipe
        self.run_folder = run
        self.log = log
        self.schedule = TrainingSchedule(recipe, ranks=mesh.data_parallel_size)
        self._dtype = DTYPES[recipe.precision]
        self._inputs = open_run_inputs(
            recipe, base=base, base_model=base_model, teacher=teacher, origin=origin
        )
        if mesh.is_main_process:
            self._inputs.verify(progress)
        table = recipe.checkpoints
        hours = table.keep_every_hours
        self._saves = CheckpointStore(
            run,
            report=log.note,
            keep_last=table.keep_last,
            keep_every=None if hours is None else timedelta(hours=hours),
        )
        save = self._latest(progress)
        if save is None:
            refuse_older_model(run.path / MODEL_FOLDER, mesh)
        self.position = Position(step=0, seconds=0.0) if save is None else self._resumed(save)
        self._phase = self._plan().phase_index
        self._teacher: Teacher | None = None if teacher is None else new_teacher(teacher, recipe)
        self._build({} if save is None else {name: save.tensor(name) for name in save.names()})
        if mesh.is_main_process:
            keep_tokenizer(run.path, self._inputs.tokenizer_source)

    def run(self) -> TrainingResult:
        """Training loop: train to the end of the recipe, or until SIGINT or SIGTERM, after which
        the run finishes the current step and writes a checkpoint.

        Raises UserError if a loss or gradient is not finite.
        """
        self._meter = self._new_meter()
        self.log.start(
            start_record(
                self.recipe,
                self.config,
                self.schedule,
                step=self.position.step,
                processes=self._mesh.world_size,
                gemm_rate=self._meter.gemm_rate,
            )
        )
        for note in self._inputs.notes(self.recipe):
            self.log.note(note)
        losses: tuple[float, ...] = ()
        saved = self.position.step
        if self._teacher is not None and saved == 0:
            self._evaluate(self._plan())
        with closing(self._inputs), retain_freed_memory(), StopSignals() as stop:
            while self.position.step < self.schedule.steps and not self._mesh.any(stop.asked):
                plan = self._plan()
                self._enter_phase(plan)
                if plan.begins_phase and begins_with_evaluation(self.recipe, plan.phase_index):
                    self._evaluate(plan)
                losses = self._step(plan).losses
                if plan.ends_phase or self.position.step % self.recipe.evaluation.every_steps == 0:
                    self._evaluate(plan)
                if plan.ends_phase or self.position.step % self.recipe.checkpoints.every_steps == 0:
                    self._save()
                    saved = self.position.step
            if saved < self.position.step:
                self._save()
        self._saves.close()
        complete = self.position.step >= self.schedule.steps
        if not complete:
            self.log.note(
                f"stopped after step {self.position.step}; the same command resumes from there"
            )
        return TrainingResult(
            step=self.position.step,
            is_complete=complete,
            losses=losses,
            model=self._export() if complete else None,
        )

    @property
    def config(self) -> ModelConfig:
        """Config of the model in the current phase."""
        return self.model.config

    def _latest(self, progress: Progress) -> TrainingCheckpoint | None:
        """The checkpoint to resume from; rank 0 finds and verifies it."""
        save = self._saves.latest(progress) if self._mesh.is_main_process else None
        step = self._mesh.broadcast(-1 if save is None else save.step)
        return self._saves.open(step) if save is None and step >= 0 else save

    def _resumed(self, save: TrainingCheckpoint) -> Position:
        """Position of `save`. Raises UserError if its recipe or inputs differ from this run's."""
        folder = str(self.run_folder.path)
        position = check_resumable(save.metadata, self.recipe, self._inputs, self.schedule, folder)
        check_config(save.metadata, self._inputs.configs, self.schedule, folder)
        return position

    def _plan(self) -> StepPlan:
        return self.schedule.at(min(self.position.step, self.schedule.steps - 1))

    def _build(self, tensors: dict[str, Tensor]) -> None:
        """Build model and optimizer of the current phase, from the state `tensors` unless empty.

        Tensors are popped from the mapping, so that each can be freed after it is copied.
        """
        config = self._inputs.configs[self._phase]
        moments, random = part(tensors, OPTIMIZER), tensors.get(RANDOM)
        rollouts = part(tensors, ROLLOUTS)
        weights = part(tensors, MODEL) or None
        tensors.clear()
        phase = self.recipe.phase[self._phase]
        base_model = self._inputs.base_model
        self.model: Transformer = new_model(config, self.recipe, base_model, weights, phase)
        del weights
        self._passes, self.sharded = new_passes(
            self.model,
            self._mesh,
            device=self.recipe.device,
            dtype=self._dtype,
            sequence_length=phase.sequence_length,
            teacher=self._teacher,
        )
        self.optimizer = Optimizer(self.model, self.recipe.optimizer, self.sharded)
        self.optimizer.load(moments)
        if random is not None:
            torch.set_rng_state(random)
        self._balancer = LoadBalancer(
            self.model,
            sequence_weight=self.recipe.balance.sequence_weight,
            mesh=self._mesh,
        )
        self._indexers = IndexerLosses(self.model, mesh=self._mesh)
        run = self.run_folder.path
        self.grpo = grpo_phase(self.model, self.recipe, self._phase, self._inputs, run, self._mesh)
        if self.grpo is not None:
            self.grpo.load(rollouts)

    def _enter_phase(self, plan: StepPlan) -> None:
        if plan.phase_index == self._phase:
            return
        self._phase = plan.phase_index
        state = state_tensors(self.sharded, self.optimizer)
        tensors = {name: tensor.cpu() for name, tensor in state}
        # Free the old model and optimizer before the new ones are built.
        del state, self.model, self._passes, self.sharded, self.optimizer
        del self._balancer, self._indexers, self.grpo
        gc.collect()  # gates and their hooks refer to each other
        self._build(tensors)
        self._meter = self._new_meter()
        self.log.note(f"phase {plan.phase.name} begins")

    def _step(self, plan: StepPlan) -> StepResult:
        began = time.monotonic()
        if self.grpo is not None:
            result, rollouts = self.grpo.step(plan, self.optimizer, self._balancer, self.log.note)
            return self._record(plan, result, time.monotonic() - began, rollouts)
        first, rows = self._mesh.batch_shard(plan.first_row, plan.rows)
        assert self._present is not None
        batch = self._present.train.batch(first, rows).to(self.recipe.device)
        result = train_step(
            self._passes,
            self.optimizer,
            self._balancer,
            batch,
            plan,
            num_ahead=1 + self.config.num_nextn_predict_layers,
            indexers=self._indexers,
            mesh=self._mesh,
        )
        return self._record(plan, result, time.monotonic() - began)

    def _record(
        self,
        plan: StepPlan,
        result: StepResult,
        seconds: float,
        rollouts: RolloutRecord | None = None,
    ) -> StepResult:
        """Advance and log a step, which took `seconds`. Raises UserError if it is not finite."""
        if not result.is_finite:
            self._stop_at(plan, result)
        self._advance(1, seconds)
        if not result.has_targets:
            self.log.note(f"step {plan.step + 1}: its batch has no target; no weight was updated")
        if self.position.step % self.recipe.log.every_steps == 0 or plan.ends_phase:
            tokens = self.schedule.tokens_before(self.position.step)
            record = self._meter.record(plan, result, self.position, seconds, tokens, rollouts)
            self.log.step(record)
        self._saves.poll()
        return result

    def _advance(self, steps: int, seconds: float) -> None:
        self.position = Position(
            step=self.position.step + steps, seconds=self.position.seconds + seconds
        )

    def _stop_at(self, plan: StepPlan, result: StepResult) -> None:
        self._saves.wait()
        if not self._mesh.broadcast(int(plan.step in self._saves.steps())):
            self._save()
        kept = "saved by rank 0" if self.grpo is None else "the last file of samples"
        if self._mesh.is_main_process and self._present is not None:
            path = batch_file(self.run_folder.path, plan.step)
            kept = keep_batch(path, plan.step, self._present.train.batch(plan.first_row, plan.rows))
        self._saves.wait()
        self._mesh.barrier()
        losses = (*result.losses, result.matched or 0.0)
        what = "gradient" if all(map(math.isfinite, losses)) else "loss"
        if self.grpo is not None:
            what = "loss or gradient"
        raise UserError(
            f"step {plan.step + 1}: the {what} is not finite; its batch is {kept}, the checkpoint "
            f"before it in {self._saves.folder}; to continue, run lowlat train export "
            f"{self.run_folder.path} DST, and a new recipe with base_model = DST and a lower "
            "learning_rate"
        )

    def _evaluate(self, plan: StepPlan) -> None:
        data, prompts = self._present, None if self.grpo is None else self.grpo.evaluation
        began = time.monotonic()
        self.log.status("evaluating")
        at = self.position.step, self.schedule.tokens_before(self.position.step)
        if prompts is not None:
            self.log.evaluation(pass_at_k_record(prompts, *at, self.log.note))
        elif data is not None and data.held_out is not None:
            batches = self._held_out_batches(plan, data.held_out)
            num_ahead = 1 + self.config.num_nextn_predict_layers
            found = evaluate(self._passes, batches, num_ahead=num_ahead, mesh=self._mesh)
            self.log.evaluation(eval_record(found, num_ahead, *at, data))
        self._advance(0, time.monotonic() - began)
        self.log.status("")

    def _held_out_batches(self, plan: StepPlan, windows: PackedRows) -> Iterator[Batch]:
        """Held-out micro-batches of this process; missing ones repeat the last without targets."""
        rows = min(self.recipe.evaluation.sequences, windows.per_epoch)
        size = plan.phase.micro_batch_size
        firsts = range(0, rows, size)
        for round_first in range(0, len(firsts), self._mesh.data_parallel_size):
            mine = round_first + self._mesh.data_parallel_rank
            first = firsts[min(mine, len(firsts) - 1)]
            batch = windows.batch(first, min(size, rows - first))
            if mine >= len(firsts):
                batch = replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))
            yield batch.to(self.recipe.device)

    def _save(self) -> None:
        began = time.monotonic()
        self._saves.wait()  # frees the copy of the last state before the next is made
        # The next phase begins with draws of its own.
        continues = self._plan().phase_index == self._phase
        tensors = snapshot(
            self.sharded,
            self.optimizer,
            rollouts=self.grpo.state() if self.grpo is not None and continues else (),
            keep=self._mesh.is_main_process,
        )
        if self._mesh.is_main_process:
            self._saves.write_async(
                self.position.step,
                tensors,
                facts(self.recipe, self.config, self.position, self._inputs, self.schedule),
            )
        self._advance(0, time.monotonic() - began)

    def _export(self) -> Path:
        dst = self.run_folder.path / MODEL_FOLDER
        if self._mesh.broadcast(int(dst.exists())):
            return dst
        weights = {
            name: tensor.cpu()
            for name, tensor in self.sharded.full_parameters()
            if self._mesh.is_main_process
        }
        if self.recipe.lora is not None:
            weights = dict(merged(weights, self.recipe.lora))
        if self._mesh.is_main_process:
            dtype = "fp32" if self.recipe.precision == "fp32" else "bf16"
            config = replace(self.config, mtp_copies=self._inputs.mtp_copies)
            export(config, weights, dst, dtype=dtype, text=self.run_folder.path / TOKENIZER)
        self._mesh.barrier()
        return dst

    @property
    def _present(self) -> PhaseData | None:
        return self._inputs.data[self._phase]

    def _new_meter(self) -> StepRecorder:
        phase = self.recipe.phase[self._phase]
        return StepRecorder(
            flops_per_token=training_flops(
                self.config, self.recipe, phase, self._inputs.teacher_config
            ),
            gemm_rate=measure_gemm_rate(self._dtype, self.recipe.device) * self._mesh.world_size,
            device=torch.device(self.recipe.device),
        )
