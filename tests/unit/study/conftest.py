"""A token folder of a few kilobytes, a size that trains on it in moments, and plans for both."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from train.data.conftest import Make, make_folder, texts

from lowlat.study.attention import attention_arms
from lowlat.study.plan import Plan
from lowlat.study.sizes import TINY, Size
from lowlat.train.data.folder import TokenFolder

__all__ = ["make_folder"]  # the fixture

MakePlan = Callable[..., Plan]


@pytest.fixture(autouse=True)
def known_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run measures the machine for a second otherwise."""
    monkeypatch.setattr("lowlat.train.trainer.measure_gemm_rate", lambda *_arguments: 1e9)


@pytest.fixture
def data(make_folder: Make) -> TokenFolder:
    return make_folder(texts(40), held_out=texts(9))


@pytest.fixture
def size() -> Size:
    return replace(
        TINY,
        sequence_length=13,
        batch_rows=3,
        micro_batch_rows=3,
        held_out_windows=7,
        decode_context=29,
        steps=4,
    )


@pytest.fixture
def make_plan(data: TokenFolder, size: Size) -> MakePlan:
    """A study of MHA and MLA with two seeds; `changes` replace fields."""

    def make(**changes: object) -> Plan:
        arms = attention_arms(size, data.vocab_size)
        chosen = tuple(arm for arm in arms if arm.name in ("mha", "mla"))
        plan = Plan(
            kind="attention", data=data.path, size=size, steps=size.steps, arms=chosen, seeds=(1, 2)
        )
        return replace(plan, **changes)  # pyright: ignore[reportArgumentType]

    return make
