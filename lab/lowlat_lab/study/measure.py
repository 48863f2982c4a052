"""Held-out measurements of a trained model: loss by window, expert load, draft acceptance."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lowlat import api
from lowlat.checkpoint.load import load_model
from lowlat.data.dataset import TokenizedDataset
from lowlat.train.inputs.phase_data import phase_data, phase_dataset
from lowlat.train.layers.stacked_experts import stack_experts
from lowlat.train.recipe.schema import Recipe
from lowlat.train.run.build import DTYPES
from lowlat.train.step.balance import LoadBalancer
from lowlat.train.step.passes import PlainPasses
from lowlat.train.step.step import evaluate
from lowlat.utils.progress import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """Figures of one model on the held-out windows."""

    window_losses: tuple[float, ...]
    """Mean next-token loss of every window, in nats per token."""
    mtp_losses: tuple[float, ...]
    """Mean loss of each MTP module."""
    max_violations: tuple[float, ...]
    """MaxVio of every MoE layer, over all windows together."""

    @property
    def loss(self) -> float:
        """Mean over windows, all of which have the same number of targets."""
        return statistics.fmean(self.window_losses)

    @property
    def standard_error(self) -> float | None:
        """Standard error of `loss` for text of this kind, with windows as independent samples."""
        return standard_error(self.window_losses)


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean of `values`; None for one value."""
    if len(values) < 2:
        return None
    return statistics.stdev(values) / math.sqrt(len(values))


def measure(folder: Path, recipe: Recipe, *, most_windows: int, progress: Progress) -> HeldOut:
    """Evaluate the model in `folder`, trained by `recipe`, on the first `most_windows` windows of
    the held-out split, or on all if there are fewer.
    """
    model = load_model(folder, dtype="fp32").model
    stack_experts(model)
    num_ahead = 1 + model.config.num_nextn_predict_layers
    dataset = phase_dataset(recipe, 0, Path("/"))
    assert dataset is not None  # only GRPO phases have none
    windows = phase_data(recipe, 0, dataset, num_ahead).held_out
    assert windows is not None  # checked by open_data
    rows = min(most_windows, windows.per_epoch)
    passes = PlainPasses(model, DTYPES[recipe.precision])
    balancer = LoadBalancer(model, sequence_weight=0.0)
    losses = []
    length = recipe.phase[0].sequence_length
    with (
        progress.task("held-out text", rows) as task,
        balancer.observe(sequence_length=length, num_sequences=1),
    ):
        for row in range(rows):
            batch = windows.batch(row, 1)
            losses.append(evaluate(passes, [batch], num_ahead=num_ahead))
            task.advance()
    balancer.reduce()
    main, *mtp = zip(*losses, strict=True)
    return HeldOut(
        window_losses=tuple(main),
        mtp_losses=tuple(map(statistics.fmean, mtp)),
        max_violations=tuple(load.max_violation for load in balancer.loads()),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Drafts:
    """Draft accuracy of MTP modules on held-out text; shares of positions, one per module."""

    acceptance: tuple[float, ...]
    """Acceptance rate: drafts that equal the main model's greedy token."""
    draft_hits: tuple[float, ...]
    """Drafts that equal the text's token."""
    main_hits: tuple[float, ...]
    """Greedy tokens of the main model that equal the text's token, at the same positions."""


def drafts(folder: Path, data: TokenizedDataset, *, length: int, windows: int) -> Drafts:
    """Draft acceptance of the model in `folder` on `windows` windows of `length` held-out tokens.

    At position i, MTP module k drafts token i + k + 2, given the text up to token i + k + 1.
    """
    model = api.load(str(folder), dtype="fp32", speculates=False)
    depths = model.config.num_nextn_predict_layers
    sums = np.zeros((3, depths))
    drafted = np.zeros(depths)
    for place in range(min(windows, data.num_tokens("held_out") // length) if depths else 0):
        ids = data.tokens("held_out", np.arange(place * length, (place + 1) * length))
        likeliest = model.logits(ids.tolist()).argmax(dim=-1).numpy()
        for depth, logits in enumerate(model.mtp_logits(ids.tolist())):
            # Row i drafts token i + depth + 2, which the main model predicts at i + depth + 1.
            proposed = logits.argmax(dim=-1).numpy()[:-1]
            decided, truth = likeliest[depth + 1 : -1], ids[depth + 2 :]
            sums[:, depth] += (
                (proposed == decided).sum(),
                (proposed == truth).sum(),
                (decided == truth).sum(),
            )
            drafted[depth] += len(proposed)
    shares = sums / np.maximum(drafted, 1)
    kept, hits, own = (tuple(row.tolist()) for row in shares)
    return Drafts(acceptance=kept, draft_hits=hits, main_hits=own)
