"""Page allocator and prefix cache: model-based random test, and time per operation.

    python benchmarks/page_allocator.py [--seeds 20] [--steps 100000] [--pages 100000]
        [--out FOLDER]

For each seed, runs --steps random steps (admit, extend, fork, publish, shorten, finish, grow,
clear) of sequences on a small allocator. Every page that is allocated, found or evicted is compared
with a simple model, and so are the entries of every page; `check_integrity` runs after every tenth
step. The first difference ends the run with an error. Then times each operation per page in an
allocator of --pages pages.
"""

import argparse
import random
import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import results_file
from page_driver import Driver

from lowlat.engine.page_allocator import PageAllocator
from lowlat.engine.prefix import PrefixCache

PAGE_SIZE = 64


def drive(seed: int, steps: int) -> dict[str, float]:
    """Counts of one seed's steps. Raises AssertionError if the allocator differs from the model."""
    start = time.perf_counter()
    driver = Driver(seed)
    driver.run(steps, check_every=10)
    seconds = time.perf_counter() - start
    cache = driver.cache
    return {
        "seed": seed,
        "steps": steps,
        "seconds": round(seconds, 2),
        "hit_rate": round(cache.hit_tokens / cache.queried_tokens, 3),
        **dict(sorted(driver.done.items())),
    }


def microseconds_per_page(num_pages: int) -> dict[str, float]:
    """Time of each operation per page, in an allocator full of sequences of 64 pages."""
    allocator = PageAllocator(num_pages)
    cache = PrefixCache(allocator, page_size=PAGE_SIZE)
    generator = random.Random(0)
    spent: dict[str, float] = defaultdict(float)
    texts = [
        [generator.randrange(128_000) for _ in range(64 * PAGE_SIZE)]
        for _ in range(num_pages // 64)
    ]
    forms = ["decode"] * 64

    def timed(name: str, start: float) -> None:
        spent[name] += time.perf_counter() - start

    for text in texts:
        start = time.perf_counter()
        pages = allocator.allocate(64)
        timed("allocate free pages", start)
        start = time.perf_counter()
        cache.insert(b"", text, forms, pages)
        timed("insert", start)
        start = time.perf_counter()
        allocator.release(pages)
        timed("release", start)
    for text in texts:
        start = time.perf_counter()
        pages = cache.match(b"", text, forms)
        timed("match", start)
        allocator.release(pages)
    for _ in texts:
        start = time.perf_counter()
        allocator.allocate(min(64, allocator.num_available))
        timed("allocate and evict", start)
    return {name: round(1e6 * seconds / (64 * len(texts)), 2) for name, seconds in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--pages", type=int, default=100_000)
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    runs = []
    for seed in range(options.seeds):
        runs.append(drive(seed, options.steps))
        print("  ".join(f"{name} {value}" for name, value in runs[-1].items()), flush=True)
    print(f"{sum(run['steps'] for run in runs):,} steps over {len(runs)} seeds: no difference")
    speed = microseconds_per_page(options.pages)
    print(f"microseconds per page of {PAGE_SIZE} tokens, allocator of {options.pages:,} pages:")
    for name, value in speed.items():
        print(f"  {name:20} {value:6.2f}")
    if options.out is not None:
        found = {"pages": options.pages, "runs": runs, "microseconds_per_page": speed}
        results_file.write(results_file.heading() | found, options.out)


if __name__ == "__main__":
    main()
