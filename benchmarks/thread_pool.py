"""Time of a phase of the native kernels' thread pool: barrier, and distribution of work.

    python benchmarks/thread_pool.py [--threads 1,2,4,...] [--rounds 5]

In microseconds, the median of the rounds, for phases without items (a barrier) and with 16 items
without work per thread, in shrinking and in equal chunks. With more threads than processors
(oversubscribed), a barrier waits until the system has run every thread: such figures bound the
pool's own cost only from above.
"""

import argparse
import statistics

from lowlat.ops import native

ITEMS = 16
SECONDS = 0.3
"""Of a round."""


def microseconds(threads: int, items: int, shrinking: bool, rounds: int) -> float:
    """Of a phase."""
    time_phases = native.module().time_phases
    phases = max(10, int(SECONDS / time_phases(threads, 20, items, shrinking)))
    taken = (time_phases(threads, phases, items, shrinking) for _ in range(rounds))
    return 1e6 * statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", default="1,2,4,8,16,32,64,128")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"{native.processors()} processors; microseconds of a phase")
    print(f"{'threads':>7} {'barrier':>10} {'shrinking':>10} {'equal':>10}")
    for threads in map(int, args.threads.split(",")):
        kinds = ((0, True), (ITEMS * threads, True), (ITEMS * threads, False))
        times = (microseconds(threads, *kind, args.rounds) for kind in kinds)
        print(f"{threads:>7}", *(f"{each:>10.2f}" for each in times), flush=True)


if __name__ == "__main__":
    main()
