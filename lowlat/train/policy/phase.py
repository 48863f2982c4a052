"""A GRPO phase of a training run: rollouts, updates of the weights over them, and their state in
checkpoints.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, astuple, fields, replace
from typing import Any

import torch
from torch import Tensor

from lowlat.train.metrics.record import RolloutRecord
from lowlat.train.parallel.mesh import ProcessMesh
from lowlat.train.policy.batch_state import batch_of, gathered, tensors_of
from lowlat.train.policy.evaluation import HeldOutEvaluation
from lowlat.train.policy.generation import GenerationFigures, Generator
from lowlat.train.policy.learner import PolicyBatch, PolicyFigures, PolicyLearner
from lowlat.train.policy.rollouts import RolloutEngine
from lowlat.train.recipe.schedule import StepPlan
from lowlat.train.step.balance import LoadBalancer
from lowlat.train.step.optim import Optimizer
from lowlat.train.step.step import StepResult

DRAWS, FIGURES, BATCH = "draws", "figures", "batch."
"""Names of the state's tensors."""


class GRPOPhase:
    """Steps of a GRPO phase."""

    def __init__(
        self,
        learner: PolicyLearner,
        engine: RolloutEngine,
        generator: Generator,
        *,
        iterations: int,
        evaluation: HeldOutEvaluation | None = None,
        mesh: ProcessMesh | None = None,
    ) -> None:
        """iterations: optimizer steps per batch of completions; mesh: the processes of the run,
        which take every step together.
        """
        self._mesh = mesh or ProcessMesh()
        self.evaluation = evaluation
        """pass@k on held-out prompts; None without them."""
        self.learner = learner
        """The passes of updates."""
        self._engine = engine
        self._generator = generator
        self._iterations = iterations
        self._batch: PolicyBatch | None = None
        self._figures: GenerationFigures | None = None

    def step(
        self,
        plan: StepPlan,
        optimizer: Optimizer,
        balancer: LoadBalancer,
        report: Callable[[str], None],
    ) -> tuple[StepResult, RolloutRecord]:
        """One optimizer step, which first samples completions if all updates over the latest are
        done. If loss or gradient are not finite, weights and state stay as before.
        report: gets a line for rewards that failed and for log-probabilities that differ.
        """
        before = self._generator.draws, self._batch, self._figures
        rate = 0.0
        if self._batch is None or self._batch.updates == self._iterations:
            self._batch, self._figures = self._generator.batch(plan.rows, plan.step + 1)
            rate = self._generator.tokens_per_second
            if self._generator.failure is not None:
                report(
                    f"step {plan.step + 1}: {self._figures.failed} completions have no reward, one "
                    f"because of {self._generator.failure}"
                )
        batch, generated = self._batch, self._figures
        assert generated is not None
        began = time.monotonic()
        figures = self.learner.accumulate(batch, plan.phase.micro_batch_size, plan.mtp_weight)
        if figures.mismatch:
            report(
                f"step {plan.step + 1}: log-probabilities of sampling and training differ by up to "
                f"{figures.mismatch:.3g}"
            )
        has_targets = figures.tokens > 0
        if has_targets and math.isfinite(figures.loss):
            norm = optimizer.step(plan.learning_rate)
        else:  # momentum and weight decay apply without gradients
            optimizer.zero_grad()
            norm = 0.0 if math.isfinite(figures.loss) else math.nan
        balancer.set_loads(figures.experts)
        result = StepResult(
            losses=(),
            z=0.0,
            sequence_loss=figures.sequence_loss,
            grad_norm=norm,
            loads=(),
            has_targets=has_targets,
            num_inputs=figures.num_inputs,
            mtp_losses=tuple(figures.mtp_losses),
        )
        if not result.is_finite:
            self._generator.draws, self._batch, self._figures = before
        else:
            batch.updates += 1
            if has_targets:
                balancer.update_biases(plan.bias_update_speed)
            self.learner.refresh()
            self._engine.refresh()
        seconds = time.monotonic() - began
        record = _record(generated, figures, rate, seconds)
        loads = tuple(load for load in balancer.loads() if load.layer in figures.experts)
        return replace(result, loads=loads), record

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Draws so far and, between updates over the same completions, these; collective."""
        yield DRAWS, torch.tensor(self._generator.draws)
        if self._batch is None or self._batch.updates == self._iterations:
            return
        assert self._figures is not None
        yield FIGURES, torch.tensor(astuple(self._figures), dtype=torch.float64)
        for name, tensor in tensors_of(gathered(self._batch, self._mesh)):
            yield BATCH + name, tensor

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `state` gave; from the beginning if there is none."""
        if DRAWS not in tensors:
            return
        self._generator.draws = int(tensors[DRAWS])
        if FIGURES in tensors:
            names = [field.name for field in fields(GenerationFigures)]
            values: dict[str, Any] = dict(zip(names, tensors[FIGURES].tolist(), strict=True))
            self._figures = GenerationFigures(**values | {"failed": int(values["failed"])})
            own = {n.removeprefix(BATCH): t for n, t in tensors.items() if n.startswith(BATCH)}
            self._batch = batch_of(own)


def _record(
    generated: GenerationFigures, figures: PolicyFigures, rate: float, seconds: float
) -> RolloutRecord:
    """Of an update that took `seconds`, over completions sampled at `rate` tokens per second."""
    counted = max(1, figures.tokens)
    return RolloutRecord(
        **asdict(generated),
        loss=figures.loss,
        entropy=figures.entropy / counted,
        clipped=figures.clipped / counted,
        mismatch=figures.mismatch,
        rollout_tokens_per_second=rate,
        update_tokens_per_second=figures.num_inputs / seconds,
        kl=None if figures.kl is None else figures.kl / counted,
    )
