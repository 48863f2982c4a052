"""A model larger than memory: prefetching mapped weights changes no bit.

Regression: advice that drops what it should fetch, and addresses beyond a matrix or a layer.
"""

import math
from dataclasses import replace

import pytest
import torch

from lowlat.config.model import ModelConfig
from lowlat.model import native as native_model
from lowlat.model.native import NativeModel, supports_native
from lowlat.ops import native
from tests.native.storages import STORAGES, stored_model
from tests.native.test_step import FEW, drawn_config, native_logits, native_modules
from tests.parity.draw import Case

from .inputs import assert_same_bits, thread_count

if not native.available():
    pytest.skip(native.reason(), allow_module_level=True)


def large_config(case: Case) -> ModelConfig:
    """Matrices of several pieces of csrc/readahead.cpp in every storage; a dense layer before those
    with experts, and an MTP module."""
    config = drawn_config(case)
    moe = config.moe
    if moe is not None:
        experts = max(2 * moe.n_group, 4)
        moe = replace(
            moe,
            n_routed_experts=experts,
            num_experts_per_tok=min(3, experts // moe.n_group * moe.topk_group),
            moe_intermediate_size=1061,
            first_k_dense_replace=1,
        )
    sizes = {"hidden_size": 251, "intermediate_size": 1063}
    return replace(config, moe=moe, num_nextn_predict_layers=1, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
@pytest.mark.parametrize("storage", STORAGES)
@torch.inference_mode()
def test_reading_ahead_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch, case: Case, storage: str
) -> None:
    model = stored_model(large_config(case), case.seed, storage)
    assert supports_native(model)
    ordinary = NativeModel(model)
    monkeypatch.setattr(native_model, "is_larger_than_memory", lambda weights_bytes: True)
    larger = NativeModel(model)
    for threads, break_even in ((1, 2.0), (3, math.inf)):
        with thread_count(threads):
            for steps in (native_logits, native_modules):
                expected = steps(ordinary, break_even)
                assert expected.isfinite().all()
                assert_same_bits(steps(larger, break_even), expected)
