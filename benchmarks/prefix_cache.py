"""Prefix cache on disk: time to first token after a restart, and decode speed of other sequences.

    python benchmarks/prefix_cache.py MODEL --tokens 32768 [--restarts 5] [--others 4] [--rounds 5]
        [--dtype bf16] [--cache auto] [--llama PYTHON --gguf FILE] [--out FOLDER]

Every measurement is a process of its own. One prefills a random prompt and leaves its pages on
disk; the restarted ones read them, alternately with the files in the system's page cache and
dropped from it. The tokens that follow must be equal. Then `--others` sequences decode while the
prompt's pages are written, while they are read, and undisturbed, in turn.

With --llama, llama.cpp (llama-cpp-python under that interpreter) prefills the same prompt, saves
the sequence by the function that its server's slots use, and restores it in another process.
Exits with 1 if tokens differ.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import results_file

from lowlat import api
from lowlat.engine.engine import Engine
from lowlat.engine.params import TokenSamplingParams
from lowlat.engine.prefill_planner import PREFILL_CHUNK, PrefillPlanner
from lowlat.generate.model import Model
from lowlat.ops import native
from lowlat.peers.protocol import random_token_ids

NEW_TOKENS = 16
DECODE_STEPS = 64
OTHER_PROMPT = 64
DISK_BYTES = 64 * 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--restarts", type=int, default=5, help="of each kind")
    parser.add_argument("--others", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--cache", default="auto")
    parser.add_argument("--llama", help="an interpreter with llama-cpp-python")
    parser.add_argument("--gguf", type=Path, help="the same model as GGUF")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: /tmp")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if (args.llama is None) != (args.gguf is None):
        parser.error("--llama needs --gguf FILE, and the other way round")
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        found = measure(args, Path(scratch))
    if args.out is not None:
        results_file.write(results_file.heading() | found, args.out)
    if not found["tokens_equal"]:
        sys.exit("the tokens differ")


def measure(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All figures, printed as they come."""
    pages = scratch / "pages"
    loading = {"dtype": args.dtype, "cache": args.cache, "context": args.tokens + 2 * NEW_TOKENS}
    run = (args.model, loading, args.tokens)
    cold = apart(first_token, *run, None)
    written = apart(first_token, *run, pages)
    size = sum(path.stat().st_size for path in pages.rglob("*") if path.is_file())
    print(f"prefill {cold['seconds']:.2f} s, while pages are written {written['seconds']:.2f} s")
    print(f"{size / 1e6:,.0f} MB on disk, {written['flush_seconds']:.2f} s to finish writing")
    restarts: dict[str, list[dict[str, Any]]] = {"in page cache": [], "dropped": []}
    for _ in range(args.restarts):
        for kind, rows in restarts.items():
            if kind == "dropped":
                drop_page_cache(pages)
            rows.append(apart(first_token, *run, pages))
    equal = all(row["ids"] == cold["ids"] for rows in restarts.values() for row in rows)
    found: dict[str, Any] = {
        "model": Path(args.model).name,
        "tokens": args.tokens,
        "bytes": size,
        "tokens_equal": equal and written["ids"] == cold["ids"],
        "prefill_seconds": cold["seconds"],
        "prefill_and_write_seconds": written["seconds"],
    }
    for kind, rows in restarts.items():
        seconds = [row["seconds"] for row in rows]
        found[f"restart, {kind}"] = spread(seconds)
        print(f"restart, {kind}: {spread_text(seconds)} s, ", end="")
        print(f"{cold['seconds'] / statistics.median(seconds):,.0f}x sooner; ", end="")
        print(f"{rows[0]['hit_tokens']} tokens read")
    if args.others > 0:
        found["decode"] = apart(others, *run, scratch / "others", args.others, args.rounds)
        for kind, row in found["decode"].items():
            print(f"{args.others} others, {kind}: {row['median']:.1f} tok/s", end="")
            ratio = row.get("ratio")
            text = "{median:.3f} ({min:.3f} to {max:.3f})"
            print(f", {text.format(**ratio)} of undisturbed" if ratio else "")
    if args.llama is not None:
        found["llama.cpp"] = llama(args, scratch / "slot.bin")
    return found


def first_token(
    model: str, loading: dict[str, Any], tokens: int, pages: Path | None
) -> dict[str, Any]:
    """Seconds from adding the prompt to its first token, and the tokens."""
    began = time.perf_counter()
    loaded = load(model, loading, pages)
    load_seconds = time.perf_counter() - began
    engine = loaded.engine
    warm(engine, loaded)
    warm_hits = hit_tokens(engine)
    began = time.perf_counter()
    request = engine.add(prompt_of(loaded, tokens), TokenSamplingParams(max_tokens=NEW_TOKENS))
    while not request.sequences[0].num_outputs:
        engine.step()
    seconds = time.perf_counter() - began
    while engine.has_work:
        engine.step()
    row: dict[str, Any] = {"seconds": seconds, "load_seconds": load_seconds}
    row["ids"] = request.sequences[0].tokens[tokens:]
    if engine.disk is not None:
        began = time.perf_counter()
        engine.disk.flush(600.0)
        row["flush_seconds"] = time.perf_counter() - began
        row["hit_tokens"] = hit_tokens(engine) - warm_hits
    engine.close()
    return row


def others(
    model: str, loading: dict[str, Any], tokens: int, pages: Path, count: int, rounds: int
) -> dict[str, Any]:
    """Decode speed of `count` sequences: undisturbed, while pages are written, and read. A ratio
    is to the mean of the undisturbed speeds before and after."""
    loaded = load(model, loading, pages)
    engine, prompt = loaded.engine, prompt_of(loaded, tokens)
    assert engine.disk is not None and engine.prefix is not None
    # One token at first: the pages of the prompt stay in memory.
    request = engine.add(prompt, TokenSamplingParams(max_tokens=1))
    while engine.has_work:
        engine.step()
    params = TokenSamplingParams(max_tokens=tokens - OTHER_PROMPT, ignore_eos=True)
    for number in range(count):
        engine.add(prompt_of(loaded, OTHER_PROMPT, number + 1), params)
    for _ in range(8):
        engine.step()
    speeds: dict[str, list[float]] = {"undisturbed": [], "written": [], "read": []}
    ratios: dict[str, list[float]] = {"written": [], "read": []}

    def undisturbed() -> float:
        engine.disk.flush(600.0)
        speeds["undisturbed"].append(decode(engine, count, lambda: False))
        return speeds["undisturbed"][-1]

    before = undisturbed()
    for _ in range(rounds):
        for kind, run in (
            ("written", lambda: while_written(engine, request.prompt, pages, count)),
            ("read", lambda: while_read(engine, prompt, count)),
        ):
            speeds[kind].append(run())
            after = undisturbed()
            ratios[kind].append(2 * speeds[kind][-1] / (before + after))
            before = after
    found: dict[str, Any] = {kind: spread(values) for kind, values in speeds.items()}
    for kind, values in ratios.items():
        found[kind]["ratio"] = spread(values)
    return found


def while_written(engine: Engine, prompt: tuple[int, ...], pages: Path, count: int) -> float:
    """Tokens per second while all pages of the prompt, which are in memory, are written."""
    assert engine.disk is not None and engine.prefix is not None
    engine.disk.flush(600.0)
    for folder in pages.glob("*/"):
        shutil.rmtree(folder)
    size = engine.runner.cache.page_size
    planner = PrefillPlanner(
        engine.runner.model.config.attention, chunk=PREFILL_CHUNK, page_size=size
    )
    paths = [planner.page_path(page, len(prompt)) for page in range((len(prompt) - 1) // size)]
    held = engine.prefix.match(b"", prompt, paths)
    for page in held:
        indexed = engine.prefix.indexed(page)
        assert indexed is not None
        indexed.is_on_disk = False
    engine.disk.offer(held)
    engine.runner.allocator.release(held)
    before = engine.disk.recorder.snapshot().written_bytes
    wanted = before + len(held) * engine.runner.cache.page_bytes
    disk = engine.disk
    return decode(engine, count, lambda: disk.recorder.snapshot().written_bytes < wanted)


def while_read(engine: Engine, prompt: list[int], count: int) -> float:
    """Tokens per second while requests' pages are read, one request after the other."""
    assert engine.prefix is not None
    seconds: list[float] = []
    for _ in range(DECODE_STEPS):
        engine.prefix.clear()
        request = engine.add(prompt, TokenSamplingParams(max_tokens=1))
        engine.step()
        seconds += step_seconds(engine, count, lambda: bool(engine.scheduler.loading))
        while request.sequences[0].finish_reason is None:
            engine.step()
        if len(seconds) >= DECODE_STEPS:
            return count * len(seconds) / sum(seconds)
    sys.exit("the pages are read within a step; give more --tokens")


def decode(engine: Engine, count: int, goes_on: Callable[[], bool]) -> float:
    """Tokens per second of `count` sequences, for DECODE_STEPS steps and while `goes_on`."""
    seconds = step_seconds(engine, count, goes_on, at_least=DECODE_STEPS)
    return count * len(seconds) / sum(seconds)


def step_seconds(
    engine: Engine, count: int, goes_on: Callable[[], bool], at_least: int = 0
) -> list[float]:
    """Durations of `at_least` steps of `count` sequences, and of those while `goes_on`; without
    the last step, in which another sequence may begin."""
    starts: list[float] = []
    while len(starts) < at_least or goes_on():
        if len(engine.scheduler.running) < count:
            sys.exit("the other sequences have ended; give fewer --rounds or more --tokens")
        starts.append(time.perf_counter())
        engine.step()
    return [end - start for start, end in itertools.pairwise(starts)]


def load(model: str, loading: dict[str, Any], pages: Path | None) -> Model:
    disk = {"prefix_cache_dir": pages, "prefix_cache_disk_bytes": DISK_BYTES} if pages else {}
    return api.load(model, speculates=False, **loading, **disk)


def warm(engine: Engine, loaded: Model) -> None:
    """Map the weights and allocate buffers, with a prompt that shares nothing."""
    engine.add(prompt_of(loaded, 200, 99), TokenSamplingParams(max_tokens=2))
    while engine.has_work:
        engine.step()


def hit_tokens(engine: Engine) -> int:
    return 0 if engine.disk is None else engine.disk.recorder.snapshot().hit_tokens


def prompt_of(loaded: Model, tokens: int, seed: int = 0) -> list[int]:
    ids = random_token_ids(tokens + seed, loaded.config.vocab_size)
    return ids[seed:]


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def drop_page_cache(folder: Path) -> None:
    """Drop the files of a folder from the system's page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def llama(args: argparse.Namespace, state: Path) -> dict[str, Any]:
    """llama.cpp's prefill, save and restore of the same prompt."""
    ids = apart(prompt_ids, args.model, args.tokens)
    script = Path(__file__).with_name("serving") / "llama_slot.py"

    def run(mode: str) -> dict[str, float]:
        command = [args.llama, str(script), mode, str(args.gguf), str(state)]
        done = subprocess.run(
            [*command, str(native.threads())],
            input=json.dumps(ids),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return json.loads(done.stdout)

    saved = run("save")
    print(f"llama.cpp: prefill {saved['first_token_seconds']:.2f} s, ", end="")
    print(f"save {saved['save_seconds']:.2f} s, {saved['bytes'] / 1e6:,.0f} MB")
    found: dict[str, Any] = {"saved": saved}
    for kind in ("in page cache", "dropped"):
        seconds = []
        for _ in range(args.restarts):
            if kind == "dropped":
                drop_page_cache(state.parent)
            seconds.append(run("restore")["first_token_seconds"])
        found[f"restored, {kind}"] = spread(seconds)
        print(f"llama.cpp restored, {kind}: {spread_text(seconds)} s")
    return found


def prompt_ids(model: str, tokens: int) -> list[int]:
    config = api.read_config(api.open_checkpoint(api.prepare(model)))
    return random_token_ids(tokens, config.vocab_size)


def spread(values: list[float]) -> dict[str, Any]:
    middle = statistics.median(values)
    return {"median": middle, "min": min(values), "max": max(values), "count": len(values)}


def spread_text(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
