"""Calibration worker: peak memory bandwidth and matrix-product rates of this machine, by torch.

Every rate is the best of a few tries. The results use the median over the rounds.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from lowlat.peers.protocol import serve_requests

BUFFER_BYTES = 1 << 30
"""Well above the cache sizes of common processors."""
SIDES = 256, 2048
"""Of matrices. The larger is closer to the peak; it is left out if its product takes too long."""
LONGEST_SECONDS = 1.0
TRIES = 4
HIGHEST_INT8 = 7
"""Largest int8 entry: small, so that 32-bit sums and 16-bit intermediate sums do not overflow."""


class Calibration:
    """Buffers and matrices of the calibration, allocated once."""

    def load(self) -> dict[str, Any]:
        # Ones, because untouched memory pages all map to the same page of zeros.
        self.buffer = torch.ones(BUFFER_BYTES // 8, dtype=torch.int64)
        self.ones = torch.ones(4096, dtype=torch.bfloat16)
        side = max(SIDES)
        plain = torch.randn(side, side)
        small = torch.randint(-HIGHEST_INT8, HIGHEST_INT8 + 1, (side, side), dtype=torch.int8)
        self.matrices = {"gemm_fp32": plain, "gemm_bf16": plain.bfloat16(), "gemm_int8": small}
        return {}

    def measure(self) -> dict[str, Any]:
        """bandwidth in bytes/s; gemm_* in FLOP/s of products of square matrices by dtype."""
        floats, halves = self.buffer.view(torch.float32), self.buffer.view(torch.bfloat16)
        reads = (
            self.buffer.sum,
            lambda: torch.dot(floats, floats),
            lambda: torch.mv(halves.view(-1, self.ones.numel()), self.ones),
        )
        rates: dict[str, Any] = {"bandwidth": BUFFER_BYTES / min(map(_best_seconds, reads))}
        for name, matrix in self.matrices.items():
            # The second factor in the layout of weights (a row per output) and in that of BLAS.
            rates[name] = max(product_rate(matrix, is_transposed=each) for each in (True, False))
        return rates


def product_rate(matrix: Shaped[Tensor, "side side"], *, is_transposed: bool) -> float:
    """FLOP/s of the product of a matrix with itself. Without instructions for a dtype, PyTorch may
    be a hundred times slower than in fp32.
    """
    product: Any = torch.ops.aten._int_mm if matrix.dtype == torch.int8 else torch.mm
    rate = 0.0
    for side in SIDES:
        if rate and 2 * side**3 / rate > LONGEST_SECONDS:
            break
        left = matrix[:side, :side].contiguous()
        right = left.T if is_transposed else left
        rate = max(rate, 2 * side**3 / _best_seconds(lambda a=left, b=right: product(a, b)))
    return rate


def _best_seconds(run: Callable[[], object]) -> float:
    times = []
    for _ in range(TRIES):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    calibration = Calibration()
    serve_requests({"load": calibration.load, "measure": calibration.measure})
