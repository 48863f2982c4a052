"""What verbs share in loading a model."""

from types import SimpleNamespace

import pytest
import torch

from lowlat.cli import inputs
from lowlat.ops import native
from lowlat.utils.errors import UserError


def load(threads: int) -> None:
    inputs.load_model("x", dtype="bf16", cache="auto", device="cpu", threads=threads)


def test_threads_reach_both_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: --threads that set PyTorch's pool alone, which native models do not use."""
    asked: list[int] = []
    kernels = SimpleNamespace(set_threads=asked.append)
    monkeypatch.setattr(native, "available", lambda: True)
    monkeypatch.setattr(native, "module", lambda: kernels)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)

    def stop(*_: object, **__: object) -> None:
        raise UserError("loaded")

    monkeypatch.setattr(inputs.api, "load", stop)
    with pytest.raises(UserError, match="loaded"):
        load(1)
    assert asked == [1, 1]


def test_more_threads_than_processors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "processors", lambda: 3)
    with pytest.raises(UserError, match="--threads 4: this machine has 3 processors; give 1 to 3"):
        load(4)
