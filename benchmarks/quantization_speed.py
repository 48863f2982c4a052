"""Weights per second and core that calibrated quantization takes, by native kernels and in PyTorch.

python benchmarks/quantization_speed.py --rows 1024 --columns 2048
"""

import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from torch import Tensor

from lowlat.ops import native
from lowlat.ops.calibrated_quantization import ActivationCovariance, quantize_calibrated
from lowlat.ops.weighted_quantization import quantize_int4_weighted, quantize_int8_weighted

REPEATS = 3
PYTORCH_ROWS = 128
"""Rows that PyTorch quantizes, which takes long."""


def main(
    rows: Annotated[int, typer.Option(help="Output channels.")] = 1024,
    columns: Annotated[int, typer.Option(help="Input channels, at most 4,096.")] = 2048,
) -> None:
    """Random weights and inputs, on one thread; the best of several runs."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight, inputs = torch.randn(rows, columns), torch.randn(2 * columns, columns)
    covariance = ActivationCovariance(inputs.T @ inputs / len(inputs))
    start = time.perf_counter()
    _ = covariance.factor
    print(f"factorization of the covariance: {time.perf_counter() - start:.2f} s")
    importance = covariance.matrix.diagonal()
    kinds: dict[str, Callable[[Tensor], object]] = {
        "int4 with error feedback": lambda part: quantize_calibrated(part, "int4", covariance),
        "int4, scales only": lambda part: quantize_int4_weighted(part, importance),
        "int8": lambda part: quantize_int8_weighted(part, importance),
    }
    is_available = native.available
    for name, quantize in kinds.items():
        speeds: list[str] = []
        for is_native in (True, False):
            native.available = is_available if is_native else lambda: False
            part = weight if is_native else weight[:PYTORCH_ROWS]
            speeds.append(f"{part.numel() / best_time(quantize, part) / 1e6:.2f}")
        native.available = is_available
        print(f"{name}: {speeds[0]} million weights/s, {speeds[1]} in PyTorch")


def best_time(quantize: Callable[[Tensor], object], part: Tensor) -> float:
    """Seconds of the fastest run."""
    times: list[float] = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        quantize(part)
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    typer.run(main)
