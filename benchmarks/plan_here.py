"""Compare the estimates of `lowlat plan serve MODEL --machine here` with a model's measured steps.

    python benchmarks/plan_here.py MODEL [--dtype bf16] [--seconds 30] [--out FOLDER]

The steps of the sample that the plan measures and those of the whole model are interleaved, so that
other load on the machine slows both.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import results_file

from lowlat.bench import here, sample_model
from lowlat.bench.lowlat_worker import Lowlat
from lowlat.checkpoint.hf_folder import open_checkpoint
from lowlat.checkpoint.load import read_config
from lowlat.config.model import ModelConfig
from lowlat.config.serving_layout import ServingLayout
from lowlat.ops import native
from lowlat.peers.protocol import random_token_ids
from lowlat.plan.serving.estimate import ServingJob, estimate
from lowlat.plan.serving.machines import Cluster
from lowlat.plan.serving.weights import dtype_weights

PROMPT = 2048
CONTEXTS = (128, 8192)


def steps(sample: Lowlat, narrow: Lowlat, model: Lowlat) -> dict[str, Callable[[], object]]:
    """The four steps of the sample, the small model's, and those of the whole model."""
    ids = random_token_ids(PROMPT, sample.vocab_size)
    start = here.LONG - PROMPT
    return {
        "decode": lambda: sample.decode_step(ids[0], here.SHORT),
        "long_decode": lambda: sample.decode_step(ids[1], here.LONG),
        "prefill": lambda: sample.prefill_after(ids, 0),
        "later_prefill": lambda: sample.prefill_after(ids, start),
        "layer": lambda: narrow.decode_step(1, here.SHORT),
        **{f"{n}": lambda n=n: model.decode_step(ids[2], n) for n in CONTEXTS},
        "prompt": lambda: model.prefill_after(ids, 0),
    }


def medians(runs: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median seconds of every step, interleaved; prefill every third time."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    end, number = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or number < 4:
        for name, run in runs.items():
            is_prefill = "prefill" in name or name == "prompt"
            if is_prefill and number % 3:
                continue
            for _ in range(1 if is_prefill else 6):
                start = time.perf_counter()
                run()
                found[name].append(time.perf_counter() - start)
        number += 1
    return {name: statistics.median(taken) for name, taken in found.items()}


def measure(path: Path, config: ModelConfig, dtype: str, seconds: float) -> list[dict[str, float]]:
    sample_config, narrow_config = (
        sample_model.sample_config(config, dtype),
        sample_model.narrow_config(config),
    )
    sample, narrow = (
        sample_model.new_worker(c, dtype, "bf16") for c in (sample_config, narrow_config)
    )
    model = Lowlat()
    threads, most = native.processors(), max(CONTEXTS)
    model.load(model=str(path), precision=dtype, cache="bf16", threads=threads, context=most)
    for worker in (sample, model):
        worker.fill_cache(max(here.LONG, most))
    narrow.fill_cache(here.SHORT)
    taken = medians(steps(sample, narrow, model), seconds)
    times = here.SampleTimes(
        decode=taken["decode"],
        long_decode=taken["long_decode"],
        prefill=taken["prefill"],
        later_prefill=taken["later_prefill"],
        layer=taken["layer"] / narrow_config.num_hidden_layers,
    )
    machine = here.solve(sample_config, dtype_weights(sample_config, dtype), "bf16", times)
    rows = []
    for context in CONTEXTS:
        job = ServingJob(
            weights=dtype_weights(config, dtype),
            dtype="bf16",
            users=1,
            context=context,
            prompt=PROMPT,
        )
        found = estimate(config, job, Cluster(machine=machine), ServingLayout())
        rows.append(
            {
                "context": context,
                "plan_seconds": found.decode.total,
                "measured_seconds": taken[f"{context}"],
                "ratio": taken[f"{context}"] / found.decode.total,
                "prefill_ratio": taken["prompt"] / found.first_token,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "int8", "int4"))
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    config = read_config(open_checkpoint(args.model))
    rows = measure(args.model, config, args.dtype, args.seconds)
    for row in rows:
        print(
            f"decode with {row['context']:,} cached: plan {1e3 * row['plan_seconds']:.1f} ms, "
            f"measured {1e3 * row['measured_seconds']:.1f} ms ({row['ratio']:.2f}x); prefill of "
            f"{PROMPT:,} tokens {row['prefill_ratio']:.2f}x"
        )
    if args.out is not None:
        found = {"model": str(args.model), "dtype": args.dtype, "rows": rows}
        results_file.write(results_file.heading() | found, args.out)


if __name__ == "__main__":
    main()
