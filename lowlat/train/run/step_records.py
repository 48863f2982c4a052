"""Log records of training steps and evaluations: losses, throughput, MFU, memory, expert loads."""

import math
import resource
from dataclasses import dataclass
from datetime import UTC, datetime

import torch

from lowlat.config.model import ModelConfig
from lowlat.config.parameter_count import count_parameters
from lowlat.data.dataset import TokenizedDataset
from lowlat.train.inputs.phase_data import PhaseData
from lowlat.train.metrics.record import EvalRecord, RolloutRecord, StartRecord, StepRecord
from lowlat.train.recipe.schedule import StepPlan, TrainingSchedule
from lowlat.train.recipe.schema import Recipe
from lowlat.train.run.state import Position
from lowlat.train.step.step import StepResult


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecorder:
    """Converts step results to log records."""

    flops_per_token: float
    """Model FLOPs per token, forward and backward."""
    gemm_rate: float
    """Measured FLOP/s of matrix products over all processes, the reference of MFU."""
    device: torch.device
    """Device of the training."""

    def record(
        self,
        plan: StepPlan,
        result: StepResult,
        position: Position,
        seconds: float,
        tokens: int,
        rollouts: RolloutRecord | None = None,
    ) -> StepRecord:
        """The record of the step `plan`, which took `seconds`; `tokens` is the total so far. MFU is
        that of training, unknown with `rollouts`.
        """
        num_inputs = plan.tokens if result.num_inputs is None else result.num_inputs
        rate = num_inputs / seconds
        return StepRecord(
            step=position.step,
            phase=plan.phase.name,
            tokens=tokens,
            seconds=position.seconds,
            loss=result.losses[0] if result.losses else None,
            mtp_losses=result.losses[1:] or result.mtp_losses,
            z_loss=plan.phase.z_weight * result.z,
            sequence_loss=result.sequence_loss,
            grad_norm=result.grad_norm,
            learning_rate=plan.learning_rate,
            batch_tokens=num_inputs,
            tokens_per_second=rate,
            mfu=None if rollouts else rate * self.flops_per_token / self.gemm_rate,
            memory_bytes=_memory(self.device),
            experts=result.loads,
            divergence=result.matched if result.losses else None,
            layer_error=None if result.losses else result.matched,
            indexers=result.indexers,
            rollouts=rollouts,
        )


def start_record(
    recipe: Recipe,
    config: ModelConfig,
    schedule: TrainingSchedule,
    *,
    step: int,
    processes: int,
    gemm_rate: float,
) -> StartRecord:
    """The record of a run of a model of `config` that starts after `step` steps."""
    count = count_parameters(config)
    facts = {
        "parameters": count.total,
        "active parameters": count.active,
        "MTP parameters": count.mtp,
        "precision": recipe.precision,
        "device": recipe.device,
        "processes": processes,
        "threads": torch.get_num_threads(),
        "GEMM GFLOP/s": round(gemm_rate / 1e9),
    }
    return StartRecord(
        step=step,
        name=recipe.name,
        total_steps=schedule.steps,
        tokens_total=schedule.tokens,
        facts=facts,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def eval_record(
    figures: tuple[float, ...], num_heads: int, step: int, tokens: int, data: PhaseData
) -> EvalRecord:
    """The record of an evaluation on the held-out split of `data`.

    figures: losses of `num_heads` heads, then with a teacher the divergence from it.
    """
    losses, more = figures[:num_heads], figures[num_heads:]
    has_chats = data.dataset.has_mask("held_out")
    per_byte = targets_per_byte(data.dataset, document_masks=data.document_masks)
    return EvalRecord(
        step=step,
        tokens=tokens,
        split="held_out",
        loss=losses[0],
        bits_per_byte=None if per_byte is None else losses[0] / math.log(2) * per_byte,
        mtp_losses=losses[1:],
        divergence=more[0] if more else None,
        targets="answer token" if has_chats else None,
    )


def targets_per_byte(folder: TokenizedDataset, *, document_masks: bool) -> float | None:
    """Targets of the held-out split of `folder` per byte of its text.

    None if part of the text is no target: chats, and masked documents that start without a
    begin-of-text token.
    """
    size = folder.num_bytes("held_out")
    if not size or folder.has_mask("held_out"):
        return None
    targets = folder.num_tokens("held_out")
    if document_masks:
        if folder.manifest.begin_of_text is None:
            return None
        targets -= folder.num_documents("held_out")
    return targets / size


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
