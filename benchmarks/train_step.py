"""Training throughput compared with transformers' DeepseekV3ForCausalLM, on the same weights.

    python benchmarks/train_step.py --precision bf16 --rounds 5 --out results.json

Both programs take the same tokens and optimiser, each in its own process, and their steps are
interleaved, so that disturbances of the machine affect both. Losses are compared before anything is
timed. transformers trains as its Trainer does: fp32 weights under bf16 autocast, with eager experts
or its default grouped ones.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PEERS = ("lowlat", "transformers", "transformers-eager")
CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 192,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 256,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "vocab_size": 8192,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_interleave": True,
    "attention_bias": False,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LEARNING_RATE, BETAS, EPS, DECAY, CLIP = 1e-4, (0.9, 0.95), 1e-8, 0.1, 1.0


def tokens(rows: int, length: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, CONFIG["vocab_size"], (rows, length + 1), generator=generator)


def lowlat_stepper(folder: Path, arguments: argparse.Namespace) -> Any:
    from lowlat.checkpoint.load import load_model
    from lowlat.data.batch import Batch
    from lowlat.train.layers.fused import use_fused_layers
    from lowlat.train.layers.stacked_experts import stack_experts
    from lowlat.train.parallel.mesh import ProcessMesh
    from lowlat.train.parallel.parallelize import parallelize
    from lowlat.train.recipe.schedule import StepPlan
    from lowlat.train.recipe.schema import OptimizerConfig, Phase
    from lowlat.train.step.balance import LoadBalancer
    from lowlat.train.step.optim import Optimizer
    from lowlat.train.step.passes import PlainPasses
    from lowlat.train.step.step import train_step

    model = load_model(folder, dtype="fp32").model
    stack_experts(model)
    use_fused_layers(model)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.precision]
    sharded = parallelize(model, ProcessMesh(), device="cpu", dtype=dtype)
    table = OptimizerConfig(betas=BETAS, eps=EPS, weight_decay=DECAY, max_grad_norm=CLIP)
    optimizer = Optimizer(model, table, sharded)
    balancer = LoadBalancer(model, sequence_weight=0.0)
    passes = PlainPasses(model, dtype)
    phase = Phase(
        name="bench",
        steps=1,
        sequence_length=arguments.length,
        batch_size=float(arguments.rows),
        micro_batch_size=arguments.rows,
        learning_rate=LEARNING_RATE,
    )

    def step(number: int) -> float:
        ids = tokens(arguments.rows, arguments.length, number)
        batch = Batch(tokens=ids, loss_mask=torch.ones_like(ids, dtype=torch.bool))
        plan = StepPlan(
            step=number,
            phase_index=0,
            phase=phase,
            first_row=0,
            rows=arguments.rows,
            learning_rate=LEARNING_RATE,
            mtp_weight=0.0,
            bias_update_speed=0.0,
            ends_phase=False,
        )
        return train_step(passes, optimizer, balancer, batch, plan, num_ahead=1).losses[0]

    return step


def transformers_stepper(folder: Path, arguments: argparse.Namespace, experts: str | None) -> Any:
    import transformers

    options = {} if experts is None else {"experts_implementation": experts}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **options
    ).train()
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=BETAS,
        eps=EPS,
        fused=True,
    )

    def step(number: int) -> float:
        ids = tokens(arguments.rows, arguments.length, number)
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.precision == "bf16"):
            logits = model(ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def work(arguments: argparse.Namespace) -> None:
    """Worker process: run a training step for every line of stdin."""
    folder = Path(arguments.folder)
    if arguments.worker == "lowlat":
        from lowlat.utils.memory import retain_freed_memory

        with retain_freed_memory():  # as Trainer.run() does
            take_steps(lowlat_stepper(folder, arguments))
    else:
        eager = "eager" if arguments.worker.endswith("eager") else None
        take_steps(transformers_stepper(folder, arguments, eager))


def take_steps(step: Callable[[int], float]) -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        begin = time.perf_counter()
        loss = step(int(line))
        seconds = time.perf_counter() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"loss": loss, "seconds": seconds, "peak_bytes": peak}), flush=True)


class Worker:
    def __init__(self, name: str, folder: Path, arguments: argparse.Namespace) -> None:
        options = {k: getattr(arguments, k) for k in ("precision", "rows", "length")}
        flags = [f"--{key}={value}" for key, value in options.items()]
        command = [sys.executable, __file__, f"--worker={name}", f"--folder={folder}", *flags]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read()

    def step(self, number: int) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        return json.loads(self._read())

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args}: ended early")
        return line


def make_checkpoint(folder: Path) -> None:
    from lowlat.checkpoint.save import save_model
    from lowlat.config.hf.reader import config_from_hf
    from lowlat.model.init import init_weights
    from lowlat.model.transformer import Transformer

    config = config_from_hf(CONFIG, source="benchmark")
    model = Transformer(config)
    init_weights(model, seed=1)
    save_model(model, config, folder, source=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--experts", type=int, help="routed experts per layer")
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments)
    if arguments.experts:
        CONFIG["n_routed_experts"] = arguments.experts
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        make_checkpoint(folder)
        workers = {name: Worker(name, folder, arguments) for name in arguments.peers}
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
        for round_ in range(arguments.rounds + 1):  # the first warms up and compares losses
            for name, worker in workers.items():
                samples[name].append(worker.step(round_))
    for worker in workers.values():
        worker.process.terminate()
    first = {name: found[0]["loss"] for name, found in samples.items()}
    spread = max(first.values()) - min(first.values())
    print(f"loss of the first step: {first} (spread {spread:.2e})")
    count = arguments.rows * arguments.length
    result: dict[str, Any] = {"arguments": vars(arguments) | {"out": None}, "peers": {}}
    for name, found in samples.items():
        seconds = [sample["seconds"] for sample in found[1:]]
        rate = count / statistics.median(seconds)
        peak = found[-1]["peak_bytes"]
        result["peers"][name] = {"tokens_per_second": rate, "peak_bytes": peak, "seconds": seconds}
        print(f"{name:20} {rate:8.0f} tokens/s  peak {peak / 2**20:6.0f} MiB")
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
