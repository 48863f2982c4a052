"""Calibration worker: peak memory bandwidth and matrix-product rates of this machine, by torch.

Every rate is the best of a few tries. The results use the median over the rounds.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from lowlat.peers.protocol import serve_requests

BUFFER_BYTES = 1 << 30
"""Well above the cache sizes of common processors."""
SIDE = 2048
TRIES = 4
HIGHEST_INT8 = 7
"""Largest int8 entry: small, so that 32-bit sums and 16-bit intermediate sums do not overflow."""


class Calibration:
    """Buffers and matrices of the calibration, allocated once."""

    def load(self) -> dict[str, Any]:
        # Ones, because untouched memory pages all map to the same page of zeros.
        self.buffer = torch.ones(BUFFER_BYTES // 8, dtype=torch.int64)
        self.ones = torch.ones(4096, dtype=torch.bfloat16)
        plain = torch.randn(SIDE, SIDE)
        small = torch.randint(-HIGHEST_INT8, HIGHEST_INT8 + 1, (SIDE, SIDE), dtype=torch.int8)
        self.matrices = {"gemm_fp32": plain, "gemm_bf16": plain.bfloat16(), "gemm_int8": small}
        return {}

    def measure(self) -> dict[str, Any]:
        """bandwidth in bytes/s; gemm_* in FLOP/s of a SIDE x SIDE x SIDE product by dtype."""
        floats, halves = self.buffer.view(torch.float32), self.buffer.view(torch.bfloat16)
        reads = (
            self.buffer.sum,
            lambda: torch.dot(floats, floats),
            lambda: torch.mv(halves.view(-1, self.ones.numel()), self.ones),
        )
        rates: dict[str, Any] = {"bandwidth": BUFFER_BYTES / min(map(_best_seconds, reads))}
        for name, matrix in self.matrices.items():
            product: Any = torch.ops.aten._int_mm if matrix.dtype == torch.int8 else torch.mm
            # The second factor in the layout of weights (a row per output) and in that of BLAS.
            layouts = (matrix.T, matrix)
            seconds = min(_best_seconds(lambda b=b, a=matrix, f=product: f(a, b)) for b in layouts)
            rates[name] = 2 * SIDE**3 / seconds
        return rates


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
