"""A token folder of a few kilobytes, a size that trains on it in moments, and plans for both."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from lowlat_lab.study.attention import attention_variants
from lowlat_lab.study.plan import StudyPlan
from lowlat_lab.study.sizes import TINY, StudySize

from lowlat.data.dataset import TokenizedDataset
from tests.unit.data.conftest import Make, make_folder, texts

__all__ = ["make_folder"]  # the fixture

MakePlan = Callable[..., StudyPlan]


@pytest.fixture
def data(make_folder: Make) -> TokenizedDataset:
    return make_folder(texts(40), held_out=texts(9))


@pytest.fixture
def size() -> StudySize:
    return replace(
        TINY,
        sequence_length=13,
        batch_size=3,
        micro_batch_size=3,
        held_out_windows=7,
        decode_contexts=(29,),
        steps=4,
    )


@pytest.fixture
def make_plan(data: TokenizedDataset, size: StudySize) -> MakePlan:
    """A study of MHA and MLA with two seeds; `changes` replace fields."""

    def make(**changes: object) -> StudyPlan:
        variants = attention_variants(size, data.vocab_size)
        chosen = tuple(variant for variant in variants if variant.name in ("mha", "mla"))
        plan = StudyPlan(
            kind="attention",
            data=data.path,
            size=size,
            steps=size.steps,
            variants=chosen,
            seeds=(1, 2),
        )
        return replace(plan, **changes)  # pyright: ignore[reportArgumentType]

    return make
