"""The rate of matrix products on this machine, measured in a moment: what MFU is a share of."""

import time

import torch

SIDES = {"cpu": 2048, "cuda": 8192, "mps": 2048}
"""Rows and columns of the factors: well beyond caches."""
WARM_UP = 2
LEAST_TRIES, TRIES = 3, 5
PATIENCE = 1.0
"""Seconds after which no further try begins, beyond the least: one alone may be of a moment in
which the machine did something else.
"""


def measure_gemm_rate(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """FLOP/s of a square product in `dtype` (fp32, bf16, fp16) on `device` with the threads torch
    has: the best of a few tries. Takes about a second on usual machines.
    """
    device = torch.device(device)
    side = SIDES[device.type]
    # Numbers of its own: how often a run measures must not change the random numbers it trains by.
    own = torch.Generator(device).manual_seed(0)
    left = torch.randn(side, side, device=device, generator=own).to(dtype)
    right = torch.randn(side, side, device=device, generator=own).to(dtype)
    out = torch.empty(side, side, device=device, dtype=dtype)
    began, times = time.perf_counter(), []
    while len(times) < WARM_UP + TRIES:
        start = time.perf_counter()
        # The second factor as weights lie in memory: one row per output.
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
