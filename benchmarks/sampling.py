"""Time to sample one token from its logits: native kernel and PyTorch reference.

    python benchmarks/sampling.py [--rounds 30] [--vocab 32000,49152,129280]

Both are timed interleaved, in milliseconds; the output is the median of the rounds. Logits are
normally distributed: flat ones with standard deviation 1, peaked ones with 4. Every draw has a new
random number.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from lowlat.ops import native, sampling

OPTIONS: dict[str, dict[str, Any]] = {
    "T 1": {"temperature": 1.0},
    "T 0.6, top_p 0.95": {"temperature": 0.6, "top_p": 0.95},
    "top_k 40, top_p 0.95": {"temperature": 1.0, "top_k": 40, "top_p": 0.95},
    "min_p 0.05": {"temperature": 1.0, "min_p": 0.05},
}
DEVIATIONS = {"flat": 1.0, "peaked": 4.0}


def define(logits: torch.Tensor, number: float, **options: Any) -> int:
    """The PyTorch reference, which fp64 logits select."""
    return sampling.draw(logits.double(), number, **options)


def milliseconds(draw: Callable[..., int], logits: torch.Tensor, options: dict[str, Any]) -> float:
    number = random.random()
    start = time.perf_counter()
    draw(logits, number, **options)
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--vocab", default="32000,49152,129280", help="comma-separated")
    args = parser.parse_args()
    native.keep_torch_single_threaded()
    print(f"{native.level()}; native / reference, ms")
    for vocab in map(int, args.vocab.split(",")):
        for kind, deviation in DEVIATIONS.items():
            logits = deviation * torch.randn(vocab, generator=torch.Generator().manual_seed(1))
            for name, options in OPTIONS.items():
                times = [
                    (
                        milliseconds(sampling.draw, logits, options),
                        milliseconds(define, logits, options),
                    )
                    for _ in range(args.rounds + 2)
                ][2:]  # the first ones allocate memory
                ours, plain = (statistics.median(side) for side in zip(*times, strict=True))
                print(f"{vocab:7} {kind:6} {name:20} {ours:7.3f} {plain:8.2f}")


if __name__ == "__main__":
    main()
