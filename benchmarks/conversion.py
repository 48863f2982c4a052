"""Quality and speed of KV cache compression: methods, cache sizes, recovery training.

    python benchmarks/conversion.py WORK --text wikitext2-valid.txt --text gsm8k-test.txt
        [--model smollm2-135m] [--windows 32] [--cells NAME,...]
        [--heal 500K --heal-text FOLDER] [--speed NAME,...]

Converts every model of `CELLS` that is missing in WORK with `lowlat convert`. Compares new models
with the unconverted one, with a bf16 and an int8 KV cache: perplexity of each text (windows of 1024
tokens spread evenly over it) and top-1 agreement. --speed times decoding with the original and the
named models in WORK, interleaved. Figures go to WORK/figures.json, from which
`lowlat-lab page conversion` fills the page's tables and draws its plots.
"""

import argparse
import hashlib
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import lowlat
from lowlat.bench.benchmark_plan import check_threads
from lowlat.bench.lowlat_worker import Lowlat
from lowlat.generate.model import Model

WINDOW = 1024
SHARES = {"67": 2 / 3, "50": 0.5, "33": 1 / 3}
"""Shares of the KV cache to keep, by their part of a cell's name."""
METHODS: dict[str, list[str]] = {
    "mha2mla": ["--method", "mha2mla", "--layout", "free"],
    "transmla": ["--method", "transmla"],
    "weighted": [],
    "free": ["--layout", "free"],
}
CELLS = {
    f"{method}-{name}": ["--cache", f"{share:.4g}", *options]
    for name, share in SHARES.items()
    for method, options in METHODS.items()
}
CELLS |= {f"free-{kept}": ["--cache", f"0.{kept}", *METHODS["free"]] for kept in (62, 46, 31)}
"""With an int8 cache: a third, a quarter and a sixth of the original's bytes."""
CACHES = ("bf16", "int8")
CONTEXTS = (2048, 8000)
STEPS, ROUNDS = 32, 5
Figures = dict[str, Any]


def main() -> None:
    args = _arguments()
    store = args.work / "figures.json"
    figures: Figures = {"models": {}, "speed": []}
    if store.exists():
        figures = json.loads(store.read_text(encoding="utf-8"))
    texts = {path.stem: path.read_bytes().decode() for path in args.text}
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    measured = {"model": args.model, "windows": args.windows, "window": WINDOW, "texts": digests}
    for key, value in measured.items():
        if figures.setdefault(key, value) != value:
            sys.exit(f"{store}: its {key} are {figures[key]}, not {value}; give another WORK")
    exact = lowlat.load(args.model, dtype="bf16")
    windows = {name: _windows(exact, text, args.windows) for name, text in texts.items()}
    reference = {name: _outcome(exact, ids) for name, ids in windows.items()}
    figures["original"] = {name: math.exp(own["nll"]) for name, own in reference.items()}
    for name, options in _wanted(args).items():
        folder = args.work / name
        entry = figures["models"].setdefault(name, {})
        command = " ".join(["lowlat", *_command(args.model, Path(name), options)])
        if entry.setdefault("command", command) != command:
            sys.exit(f"{store}: {name} was made by '{entry['command']}', not '{command}'")
        if not folder.exists():
            arguments = _command(args.model, folder, options)
            subprocess.run([sys.executable, "-m", "lowlat", *arguments], check=True)
        entry["conversion"] = json.loads((folder / "conversion.json").read_text(encoding="utf-8"))
        for cache in CACHES:
            found = entry.setdefault(cache, {})
            missing = {text: ids for text, ids in windows.items() if text not in found}
            if missing:
                model = lowlat.load(str(folder), dtype="bf16", **_cache(cache))
                entry[f"{cache}_bytes_per_token"] = model.cache_bytes_per_token
                for text, ids in missing.items():
                    found[text] = _compared(_outcome(model, ids), reference[text])
                    print(f"{name}, {cache} cache, {text}: {found[text]}", flush=True)
            _save(figures, store)
    if args.speed:
        figures["speed"] = _speeds(args)
        _save(figures, store)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument(
        "--cells", help="names of CELLS, all by default, '' for none", default=",".join(CELLS)
    )
    parser.add_argument("--heal", default="", help="budgets in tokens: 100K,500K")
    parser.add_argument("--heal-text", action="append", default=[])
    parser.add_argument("--healed", default="weighted-50,weighted-33", help="cells to heal")
    parser.add_argument("--speed", default="", help="names of models in WORK")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    return args


def _wanted(args: argparse.Namespace) -> dict[str, list[str]]:
    """Names of the models to make, and their options of `lowlat convert`."""
    wanted = {name: CELLS[name] for name in args.cells.split(",") if name}
    texts = [part for path in args.heal_text for part in ("--text", path)]
    for budget in filter(None, args.heal.split(",")):
        for name in args.healed.split(","):
            wanted[f"{name}-healed-{budget}"] = [*CELLS[name], "--heal", budget, *texts]
    return wanted


def _command(model: str, folder: Path, options: list[str]) -> list[str]:
    return ["convert", model, str(folder), "--to", "mla", "--dtype", "bf16", *options]


def _cache(name: str) -> dict[str, Any]:
    return {"cache": name} if name == "int8" else {}


def _windows(model: Model, text: str, count: int) -> list[list[int]]:
    """`count` windows of tokens, evenly spread over `text`."""
    ids = model.tokenizer.encode(text)
    available = len(ids) // WINDOW
    count = min(count, available)
    starts = [i * available // count * WINDOW for i in range(count)]
    return [ids[start : start + WINDOW] for start in starts]


def _outcome(model: Model, windows: list[list[int]]) -> Figures:
    """Mean negative log-likelihood in nats, and the top-1 token at each position."""
    total, likeliest = 0.0, []
    for ids in windows:
        rows = model.logits(ids)[:-1]
        targets = torch.tensor(ids[1:])
        total += float(torch.nn.functional.cross_entropy(rows, targets, reduction="sum"))
        likeliest.append(rows.argmax(dim=-1))
    found = torch.cat(likeliest)
    return {"nll": total / len(found), "likeliest": found}


def _compared(own: Figures, original: Figures) -> Figures:
    same = (own["likeliest"] == original["likeliest"]).double().mean()
    return {
        "perplexity": math.exp(own["nll"]),
        "ratio": math.exp(own["nll"] - original["nll"]),
        "same": float(same),
    }


def _speeds(args: argparse.Namespace) -> list[Figures]:
    """Decode throughput at long contexts of the original and the named models, interleaved."""
    folders = {"original": args.model}
    folders |= {name: str(args.work / name) for name in args.speed.split(",")}
    threads = check_threads(None)  # a native model sets PyTorch's own pool to one thread
    setups = [(name, cache) for name in folders for cache in CACHES]
    steppers: dict[tuple[str, str], Lowlat] = {}
    for name, cache in setups:
        stepper = Lowlat()
        stepper.load(
            model=folders[name],
            precision="bf16",
            cache=cache,
            threads=threads,
            context=max(CONTEXTS),
        )
        steppers[name, cache] = stepper
    found: list[Figures] = []
    for context in CONTEXTS:
        rounds: dict[tuple[str, str], list[float]] = {setup: [] for setup in setups}
        for number in range(ROUNDS + 1):
            for setup in setups[number % len(setups) :] + setups[: number % len(setups)]:
                steppers[setup].fill_cache(context)
                started = time.perf_counter()
                for step in range(STEPS):
                    steppers[setup].decode_step(1 + step, context + step)
                if number:  # the first round warms up
                    rounds[setup].append(STEPS / (time.perf_counter() - started))
        base = rounds["original", "bf16"]
        for (name, cache), own in rounds.items():
            ratios = [a / b for a, b in zip(own, base, strict=True)]
            found.append(
                {
                    "model": name,
                    "cache": cache,
                    "context": context,
                    "tokens_per_second": statistics.median(own),
                    "ratio": statistics.median(ratios),
                    "least": min(ratios),
                    "most": max(ratios),
                    "cache_bytes": steppers[name, cache].model.cache_bytes_per_token * context,
                    "machine": f"{threads} threads, {platform.machine()}",
                }
            )
            print(found[-1], flush=True)
    return found


def _save(figures: Figures, path: Path) -> None:
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
