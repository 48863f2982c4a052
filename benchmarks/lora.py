"""Cost of LoRA adapters: time of decode steps with four adapters, relative to the base model.

    python benchmarks/lora.py MODEL [--dtype bf16] [--rank 8] [--projections attention|all]
        [--sequences 8] [--adapters 4] [--rounds 9] [--out FOLDER]

Adapters are random; sequence i uses adapter i % 4. Two engines over the same weights, without and
with adapters, step in turn, so that drift of the machine's speed cancels out. On a busy machine
compare processor time, with --threads 1: threads that wait count.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

import results_file
import torch
from safetensors.torch import save_file

import lowlat
from lowlat.checkpoint.adapter import PREFIX, A, B, projections
from lowlat.checkpoint.hf_folder import open_checkpoint
from lowlat.checkpoint.load import read_config
from lowlat.engine.engine import Engine
from lowlat.engine.params import TokenSamplingParams
from lowlat.engine.request import RequestOptions
from lowlat.engine.runner import ModelRunner
from lowlat.generate.model import Model
from lowlat.ops import native

MLP = ("gate_proj", "up_proj", "down_proj")
PROMPT, STEPS = 64, 24
"""Tokens of a prompt, and steps of a round."""


def write_adapter(folder: Path, model: str, rank: int, *, updates_mlp: bool, seed: int) -> Path:
    """A random adapter of the attention projections, or of all but the routed experts."""
    config = read_config(open_checkpoint(Path(model)))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (_, (rows, columns)) in projections(config).items():
        if ".experts." in name or (name.endswith(MLP) and not updates_mlp):
            continue
        a = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
        tensors[PREFIX + name + A] = a
        tensors[PREFIX + name + B] = 0.02 * torch.randn(rows, rank, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def decoding_engine(model: Model, names: list[str | None]) -> Engine:
    """An engine over the weights of `model` whose sequences all decode."""
    runner = ModelRunner(model.transformer)
    engine = Engine(runner, context=model.context, eos_ids=frozenset(), speculates=False)
    params = TokenSamplingParams(max_tokens=STEPS + 2, ignore_eos=True)
    for number, name in enumerate(names):
        prompt = [(31 * number + 7 * place) % 1000 for place in range(PROMPT)]
        engine.add(prompt, params, RequestOptions(lora=model.adapters.get(name)))
    while engine.scheduler.waiting or any(s.is_prefilling for s in engine.scheduler.running):
        engine.step()
    return engine


def seconds_of(engine: Engine) -> tuple[float, float]:
    """Wall and processor seconds of a step."""
    wall, processor = time.perf_counter(), time.process_time()
    engine.step()
    return time.perf_counter() - wall, time.process_time() - processor


def round_of(model: Model, base: list[str | None], mixed: list[str | None]) -> dict[str, float]:
    """Median seconds of steps of the base model and of adapters, which alternate."""
    engines = {"base": decoding_engine(model, base), "adapters": decoding_engine(model, mixed)}
    found = {name: [seconds_of(engine)] for name, engine in engines.items()}
    for number in range(STEPS - 2):
        for name in sorted(engines, reverse=bool(number % 2)):
            found[name].append(seconds_of(engines[name]))
    return {
        f"{name}_{kind}": statistics.median(own[place] for own in steps)
        for name, steps in found.items()
        for place, kind in enumerate(("wall", "processor"))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--projections", choices=("attention", "all"), default="attention")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    if args.threads is not None:
        native.use_threads(args.threads)
    with tempfile.TemporaryDirectory() as root:
        folders = {
            f"adapter-{number}": write_adapter(
                Path(root) / str(number),
                args.model,
                args.rank,
                updates_mlp=args.projections == "all",
                seed=number,
            )
            for number in range(args.adapters)
        }
        model = lowlat.load(args.model, dtype=args.dtype, speculates=False, lora=folders)
    base: list[str | None] = [None] * args.sequences
    mixed: list[str | None] = [[*folders][i % args.adapters] for i in range(args.sequences)]
    rounds = [round_of(model, base, mixed) for _ in range(args.rounds)]
    ratios = {}
    for kind in ("wall", "processor"):
        own = [(one[f"base_{kind}"], one[f"adapters_{kind}"]) for one in rounds]
        ratios[kind] = statistics.median(adapters / base for base, adapters in own)
        print(
            f"{args.model} {args.dtype}, {args.projections}: {kind} time of a step "
            f"{1000 * statistics.median(base for base, _ in own):.2f} ms, with {args.adapters} "
            f"adapters {100 * (ratios[kind] - 1):+.1f} %"
        )
    if args.out is not None:
        options = {name: value for name, value in vars(args).items() if name != "out"}
        found = options | {"seconds_per_step": rounds, "ratios": ratios}
        results_file.write(results_file.heading() | found, args.out)


if __name__ == "__main__":
    main()
