"""TensorBoard files of a run, written with torch's SummaryWriter.

Curves with the same prefix before the slash share a section.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, final

import numpy as np

from lowlat.train.metrics.record import EvalRecord, ExpertRecord, StartRecord, StepRecord
from lowlat.utils.errors import UserError

_IMAGE_EVERY = 100
"""Steps between images and histograms of loads; curves have every step."""
_CELL = 8
"""Side of one expert in an image, in pixels."""
_COLD, _EVEN, _HOT = (33, 102, 172), (247, 247, 247), (178, 60, 20)
"""Colors of zero load, the mean load, and twice the mean or more."""


def available() -> bool:
    """Whether tensorboard is installed."""
    return find_spec("tensorboard") is not None


@final
class TensorBoardFiles:
    """Writes log records as TensorBoard events."""

    def __init__(self, folder: Path, start: StartRecord) -> None:
        """Purge events of an earlier run for steps after `start.step`. Raises UserError if `folder`
        cannot be written.
        """
        from torch.utils.tensorboard.writer import SummaryWriter

        self._folder = folder
        self._first: int | None = None
        if not isinstance(threading.excepthook, _WriterFaults):
            threading.excepthook = _WriterFaults(threading.excepthook)
        with self._failures():
            self._writer = SummaryWriter(str(folder), purge_step=start.step + 1)

    def step(self, record: StepRecord) -> None:
        """Raises UserError if writing fails, for example on a full disk."""
        if self._first is None:
            self._first = record.step
        with self._failures():
            for name, value in _curves(record).items():
                self._writer.add_scalar(name, value, record.step)
            if record.step == self._first or record.step % _IMAGE_EVERY == 0:
                self._loads(record)

    def evaluation(self, record: EvalRecord) -> None:
        """Raises UserError as `step` does."""
        add = self._writer.add_scalar
        with self._failures():
            if record.loss is not None:
                add(f"loss/{record.split}", record.loss, record.step)
            if record.bits_per_byte is not None:
                add(f"bits_per_byte/{record.split}", record.bits_per_byte, record.step)
            for depth, loss in enumerate(record.mtp_losses, start=1):
                add(f"loss/{record.split}_mtp_{depth}", loss, record.step)
            if record.divergence is not None:
                add(f"divergence/{record.split}", record.divergence, record.step)
            if record.pass_at_k is not None:
                for k, value in record.pass_at_k.pass_at.items():
                    add(f"{record.split}/pass_at_{k}", value, record.step)

    def close(self) -> None:
        """Further calls do nothing. Raises UserError as `step` does."""
        with self._failures():
            self._writer.close()

    def _loads(self, record: StepRecord) -> None:
        layers = [layer for layer in record.experts if layer.load]
        for layer in layers:
            relative = np.asarray(layer.load) * len(layer.load)
            self._writer.add_histogram(
                f"load_over_mean/layer_{layer.layer:02}", relative, record.step
            )
        if layers:
            picture = load_picture(layers)
            self._writer.add_image(
                "experts/load_of_layers", picture, record.step, dataformats="HWC"
            )

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._folder}: TensorBoard files cannot be written ({error.strerror or error})"
            ) from error


class _WriterFaults:
    """threading.excepthook that hides OSErrors of TensorBoard's writer thread: the writer raises
    them again at the next write, which reports them in one line.
    """

    def __init__(self, before: Callable[[threading.ExceptHookArgs], Any]) -> None:
        self._before = before

    def __call__(self, arguments: threading.ExceptHookArgs) -> None:
        is_writer = type(arguments.thread).__module__.startswith("tensorboard.")
        if not (is_writer and isinstance(arguments.exc_value, OSError)):
            self._before(arguments)


def _curves(record: StepRecord) -> dict[str, float]:
    """Curves of a step by name, without those that are off or unknown."""
    curves = {
        "optimizer/learning_rate": record.learning_rate,
        "optimizer/grad_norm": record.grad_norm,
        "optimizer/batch_tokens": float(record.batch_tokens),
        "speed/tokens_per_second": record.tokens_per_second,
        "speed/memory_gb": record.memory_bytes / 1e9,
        "progress/tokens": float(record.tokens),
        "progress/hours": record.seconds / 3600,
    }
    known = {
        "loss/train": record.loss,
        "divergence/train": record.divergence,
        "divergence/layer_error": record.layer_error,
        "speed/mfu": record.mfu,
    }
    curves |= {name: value for name, value in known.items() if value is not None}
    for depth, loss in enumerate(record.mtp_losses, start=1):
        curves[f"loss/train_mtp_{depth}"] = loss
    if record.z_loss:
        curves["loss/z"] = record.z_loss
    if record.sequence_loss:
        curves["loss/sequence_balance"] = record.sequence_loss
    for layer in record.experts:
        curves[f"max_violation/layer_{layer.layer:02}"] = layer.max_violation
        curves[f"load_entropy/layer_{layer.layer:02}"] = layer.entropy
        curves[f"bias_min/layer_{layer.layer:02}"] = layer.bias_min
        curves[f"bias_max/layer_{layer.layer:02}"] = layer.bias_max
    if record.rollouts is not None:
        own = asdict(record.rollouts).items()
        curves |= {f"rollouts/{name}": float(value) for name, value in own if value is not None}
    for layer in record.indexers:
        curves[f"indexer_kl/layer_{layer.layer:02}"] = layer.kl
        curves[f"indexer_recall/layer_{layer.layer:02}"] = layer.recall
    return curves


def load_picture(layers: list[ExpertRecord]) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """Image of loads [layers * cell, experts * cell, 3]: blue below the mean, red above."""
    experts = max(len(layer.load) for layer in layers)
    relative = np.ones((len(layers), experts))
    for row, layer in enumerate(layers):
        relative[row, : len(layer.load)] = np.asarray(layer.load) * len(layer.load)
    position = np.clip(np.nan_to_num(relative, nan=1.0), 0.0, 2.0)
    colours = np.array([_COLD, _EVEN, _HOT], dtype=float)
    channels = [np.interp(position, [0.0, 1.0, 2.0], colours[:, channel]) for channel in range(3)]
    picture = np.stack(channels, axis=-1).round().astype(np.uint8)
    return picture.repeat(_CELL, axis=0).repeat(_CELL, axis=1)
