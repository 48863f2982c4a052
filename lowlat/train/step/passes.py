"""Forward and backward passes over the micro-batches of a batch (gradient accumulation): the
interface, and the implementation without pipeline parallelism.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from lowlat.data.batch import Batch
from lowlat.model.transformer import Transformer
from lowlat.train.parallel.fsdp import sum_over_replicas
from lowlat.train.parallel.local_batch import LocalBatch, local_batch
from lowlat.train.parallel.mesh import ProcessMesh
from lowlat.train.recipe.schedule import StepPlan
from lowlat.train.step.layerwise import layer_errors
from lowlat.train.step.loss import batch_loss
from lowlat.train.step.teacher import Teacher


class Passes(ABC):
    """Computes gradients of a batch and accumulates them in the parameters."""

    @abstractmethod
    def backward(
        self, batch: Batch, plan: StepPlan, targets: Sequence[int]
    ) -> Float[Tensor, "heads_and_z"]:
        """Losses and gradients of this process's rows of a global batch with `targets` targets per
        head.

        Returns fp64 sums on the CPU over this process's tokens: negative log-likelihoods of the
        main head and of each MTP module, squared log-denominators, and with a teacher the KL
        divergence. In layer-wise distillation the last is the sum of `layerwise.layer_errors` and
        all others are zero; in the warm-up of indexers all are.
        """

    @abstractmethod
    def likelihood(self, batch: Batch) -> Float[Tensor, "heads"]:
        """Negative log-likelihood of every head, and with a teacher the KL divergence, without
        gradients, in one micro-batch: fp64 sums on the CPU. In a pipeline, the result is the sum
        over stages.
        """


@final
class PlainPasses(Passes):
    """Runs micro-batches one after another through the full model (gradient accumulation)."""

    def __init__(
        self,
        model: Transformer,
        dtype: torch.dtype,
        mesh: ProcessMesh | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        """`dtype` is that of activations; `mesh` divides the model and its tokens; `teacher` is
        distilled.
        """
        self._model = model
        self._dtype = dtype
        self._mesh = mesh or ProcessMesh()
        self._teacher = teacher

    def backward(
        self, batch: Batch, plan: StepPlan, targets: Sequence[int]
    ) -> Float[Tensor, "heads_and_z"]:
        match = plan.phase.match
        if self._teacher is not None and match != "logits":
            return self._layers_backward(self._teacher, match, batch, plan, targets)
        num_ahead = len(targets)
        size = num_ahead + (1 if self._teacher is None else 2)
        sums = torch.zeros(size, dtype=torch.float64)
        parts = list(batch.split(plan.phase.micro_batch_size))
        for index, part in enumerate(parts):
            sum_over_replicas(self._model, index == len(parts) - 1)
            loss = batch_loss(
                self._model,
                *self._local(part, num_ahead),
                targets=targets,
                mtp_weight=plan.mtp_weight,
                z_weight=plan.phase.z_weight,
                dtype=self._dtype,
                teacher=self._teacher,
                is_warmup=plan.phase.is_warmup,
            )
            loss.total.backward()
            sums += loss.figures()
        return sums

    def _layers_backward(
        self,
        teacher: Teacher,
        match: Literal["attention", "layers"],
        batch: Batch,
        plan: StepPlan,
        targets: Sequence[int],
    ) -> Float[Tensor, "heads_and_z_and_match"]:
        sums = torch.zeros(len(targets) + 2, dtype=torch.float64)
        for part in batch.split(plan.phase.micro_batch_size):
            sums[-1] += layer_errors(
                self._model,
                teacher,
                *self._local(part, len(targets)),
                match=match,
                targets=targets[0],
                dtype=self._dtype,
            )
        return sums

    def _local(self, batch: Batch, num_ahead: int) -> LocalBatch:
        is_sparse = self._model.config.is_sparse
        return local_batch(self._mesh, batch, num_ahead, is_sparse=is_sparse)

    @torch.no_grad()
    def likelihood(self, batch: Batch) -> Float[Tensor, "heads"]:
        num_ahead = 1 + len(self._model.mtp)
        loss = batch_loss(
            self._model,
            *self._local(batch, num_ahead),
            targets=[1] * num_ahead,
            mtp_weight=0.0,
            z_weight=0.0,
            dtype=self._dtype,
            teacher=self._teacher,
        )
        figures = loss.figures()
        return torch.cat([figures[:num_ahead], figures[num_ahead + 1 :]])
