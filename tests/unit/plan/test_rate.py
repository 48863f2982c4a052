"""The measured rate of products."""

import pytest
import torch

from lowlat.plan import rate
from lowlat.plan.rate import measure_gemm_rate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rate_is_flops_over_the_best_time(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype):
    """Tries take 9, 9, 5, 4, 6, 3 and 8 seconds; the first two only warm up, and patience ends
    after three that count.
    """
    monkeypatch.setitem(rate.SIDES, "cpu", 64)
    starts = iter([0.0, 0.0, 9.0, 9.0, 18.0, 18.0, 23.0, 23.0, 27.0, 27.0, 33.0, 33.0])
    monkeypatch.setattr(rate.time, "perf_counter", lambda: next(starts))
    assert measure_gemm_rate(dtype) == 2 * 64**3 / 4.0


def test_the_machine_multiplies():
    assert measure_gemm_rate(torch.float32) > 1e8
