"""Small states that differ from step to step, saved and compared bit for bit."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lowlat.train.checkpoints.checkpoint import TrainingCheckpoint
from lowlat.train.checkpoints.run_folder import RunFolder
from lowlat.train.checkpoints.store import CheckpointStore


def state(step: int) -> list[tuple[str, Tensor]]:
    """Tensors of every kind that a run saves."""
    generator = torch.Generator().manual_seed(step)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return [
        ("layers.0.weight", random(5, 7)),
        ("layers.0.bf16", random(3, 11).bfloat16()),
        ("layers.0.transposed", random(2, 13).T),
        ("layers.0.gate.bias", random(13)),
        ("empty", torch.empty(0, 3)),
        ("rng.torch", torch.randint(256, (17,), generator=generator).to(torch.uint8)),
        ("steps", torch.tensor(step, dtype=torch.int64)),
        ("moments", random(5, 7)),
    ]


def facts(step: int) -> dict[str, object]:
    return {"position": 96 * step, "rng": {"python": [3, [step, 2**70], None]}, "rate": step / 7}


def assert_is(save: TrainingCheckpoint | None, *steps: int) -> int:
    """`save` is, bit for bit, the state of one of `steps`; which."""
    assert save is not None
    assert save.step in steps
    tensors = dict(state(save.step))
    assert save.names() == sorted(tensors)
    for name, expected in tensors.items():
        found = save.tensor(name)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert torch.equal(bits(found), bits(expected)), name
    assert save.metadata == facts(save.step)
    return save.step


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def saves_in(
    run: RunFolder, report: Callable[[str], None] | None = None, keep_last: int = 2
) -> CheckpointStore:
    """A store that says what they report into the void unless told otherwise; time is the step."""
    return CheckpointStore(
        run, report=report or (lambda line: None), keep_last=keep_last, clock=lambda: 1000.0
    )


def make_run(path: Path, *steps: int) -> Path:
    """A run's folder with whole saves of `steps`."""
    with RunFolder(path) as run:
        for step in steps:
            saves_in(run).write(step, state(step), facts(step))
    return path
