"""GEMM benchmark of this machine: the FLOP/s of matrix products that MFU is relative to."""

import time

import torch

SIDES = {"cpu": 2048, "cuda": 8192, "mps": 2048}
"""Rows and columns of the matrices, larger than caches."""
WARM_UP = 2
LEAST_TRIES, TRIES = 3, 5
PATIENCE = 1.0
"""Seconds after which no further try starts, once LEAST_TRIES are done: a single try may coincide
with other load.
"""


def measure_gemm_rate(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """FLOP/s of a square matrix product in `dtype` (fp32, bf16, fp16) on `device` with torch's
    threads: the best of a few tries, in about a second.
    """
    device = torch.device(device)
    side = SIDES[device.type]
    # A separate generator, so that measuring does not change the random numbers of the training.
    own = torch.Generator(device).manual_seed(0)
    left = torch.randn(side, side, device=device, generator=own).to(dtype)
    right = torch.randn(side, side, device=device, generator=own).to(dtype)
    out = torch.empty(side, side, device=device, dtype=dtype)
    began, times = time.perf_counter(), []
    while len(times) < WARM_UP + TRIES:
        start = time.perf_counter()
        # The second matrix is laid out like weights: one row per output.
        torch.mm(left, right.T, out=out)
        _wait(device)
        times.append(time.perf_counter() - start)
        if len(times) >= WARM_UP + LEAST_TRIES and time.perf_counter() - began > PATIENCE:
            break
    return 2.0 * side**3 / min(times[WARM_UP:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
