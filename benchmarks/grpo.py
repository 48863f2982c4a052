"""GRPO compared with TRL's GRPOTrainer with transformers generation, on the same weights.

    python benchmarks/grpo.py --model minnow --rounds 5 --out FOLDER

Both programs get the same prompts, group size, lengths, reward and optimizer, each in its own
process, and their steps are interleaved, so that disturbances of the machine affect both. A step
samples, scores and updates all weights. TRL trains as transformers' Trainer does: fp32 weights
under bf16 autocast, or with --trl-precision fp32 in fp32. Tokens per second are sampled tokens over
the seconds of whole steps; peak memory is the sum over a program's processes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import results_file

PEERS = ("lowlat", "trl")
LEARNING_RATE, BETAS, EPS, DECAY, CLIP = 1e-6, (0.9, 0.95), 1e-8, 0.1, 1.0
REWARD = '''
def reward(prompt, completion, record) -> float:
    """Share of different letters."""
    return len(set(completion)) / max(1, len(completion))
'''
LEFT_OUT = ("worker", "folder", "out")
"""Options that are not those of a worker."""


def prompts(count: int, words: int) -> list[str]:
    """Texts of `words` words that differ from one another from the first word on."""
    names = "river stone cloud lamp garden winter letter paper road music water bread".split()
    return [
        " ".join(
            names[(n // len(names) ** (i % 3) + i * (n + 1)) % len(names)] for i in range(words)
        )
        for n in range(count)
    ]


class Steps:
    """Worker side: a step begins with a line of stdin, and ends with its figures on stdout."""

    def __init__(self) -> None:
        # Libraries print to stdout.
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._began = 0.0
        self._send({"is_ready": True})

    def begin(self) -> None:
        if not sys.stdin.readline():
            os._exit(0)
        self._began = time.perf_counter()

    def end(self, tokens: float) -> None:
        self._send({"seconds": time.perf_counter() - self._began, "tokens": tokens})

    def _send(self, figures: dict[str, Any]) -> None:
        print(json.dumps(figures), file=self._out, flush=True)


def recipe(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "name": "bench",
        "base_model": str(arguments.model),
        "optimizer": {"betas": BETAS, "eps": EPS, "weight_decay": DECAY, "max_grad_norm": CLIP},
        "balance": {"sequence_weight": 0.0},
        "checkpoints": {"every_steps": 10**9},
        "log": {"tensorboard": False},
        "phase": [
            {
                "name": "rl",
                "steps": 10**6,
                "sequence_length": arguments.prompt + arguments.completion,
                "batch_size": float(arguments.batch),
                "micro_batch_size": arguments.micro_batch,
                "learning_rate": LEARNING_RATE,
                "mtp_weight": 0.0,
                "bias_update_speed": 0.0,
                "grpo": {
                    "prompts": "prompts.jsonl",
                    "reward_funcs": ["reward.py"],
                    "num_generations": arguments.group,
                    "max_completion_length": arguments.completion,
                },
            }
        ],
    }


def run_lowlat(arguments: argparse.Namespace) -> None:
    from lowlat.ops import native
    from lowlat.train.checkpoints.run_folder import RunFolder
    from lowlat.train.metrics.metrics_log import SilentMetricsLog
    from lowlat.train.metrics.record import RolloutRecord
    from lowlat.train.recipe.schedule import StepPlan
    from lowlat.train.recipe.schema import parse_recipe
    from lowlat.train.run.trainer import Trainer
    from lowlat.train.step.step import StepResult

    class Stepped(Trainer):
        def _step(self, plan: StepPlan) -> StepResult:
            steps.begin()
            return super()._step(plan)

        def _record(
            self,
            plan: StepPlan,
            result: StepResult,
            seconds: float,
            rollouts: RolloutRecord | None = None,
        ) -> StepResult:
            assert rollouts is not None and rollouts.mismatch == 0.0
            steps.end(rollouts.length * plan.rows)
            return super()._record(plan, result, seconds, rollouts)

    native.use_threads(arguments.threads)
    base = Path(arguments.folder)
    parsed = parse_recipe(recipe(arguments), origin="benchmark")
    with RunFolder(base / "run") as run, closing(SilentMetricsLog()) as log:
        trainer = Stepped(parsed, run, log, base=base, base_model=Path(arguments.model))
        steps = Steps()
        trainer.run()


def run_trl(arguments: argparse.Namespace) -> None:
    import datasets
    import torch
    import transformers
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    torch.set_num_threads(arguments.threads)
    sampled: list[int] = []

    def reward(**sample: Any) -> list[float | None]:
        sampled.append(sum(map(len, sample["completion_ids"])))
        return [len(set(text)) / max(1, len(text)) for text in sample["completions"]]

    class Interleaved(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            sampled.clear()
            steps.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            steps.end(sum(sampled))

    is_bf16 = arguments.trl_precision == "bf16"
    options = GRPOConfig(
        output_dir=str(Path(arguments.folder) / "trl"),
        use_cpu=True,
        bf16=is_bf16,
        per_device_train_batch_size=arguments.micro_batch,
        gradient_accumulation_steps=arguments.batch // arguments.micro_batch,
        num_generations=arguments.group,
        max_completion_length=arguments.completion,
        max_steps=10**6,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPS,
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        gradient_checkpointing=False,
        loss_type="dapo",
        beta=0.0,
        report_to="none",
        save_strategy="no",
        logging_steps=10**6,
        disable_tqdm=True,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    texts = [json.loads(line) for line in open(Path(arguments.folder) / "prompts.jsonl")]
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=options,
        train_dataset=datasets.Dataset.from_list(texts),
        processing_class=tokenizer,
        callbacks=[Interleaved()],
    )
    steps = Steps()
    trainer.train()


class Worker:
    def __init__(self, name: str, folder: Path, arguments: argparse.Namespace) -> None:
        kept = {k: v for k, v in vars(arguments).items() if k not in (*LEFT_OUT, "peers")}
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in kept.items()]
        command = [sys.executable, __file__, f"--worker={name}", f"--folder={folder}", *flags]
        environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._read()

    def step(self) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._read() | {"peak_bytes": sum(map(peak_bytes, tree(self.process.pid)))}

    def end(self) -> None:
        """The worker exits at the end of its input."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _read(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args}: ended early")
        return json.loads(line)


def tree(pid: int) -> Iterator[int]:
    """A process and those that it started."""
    yield pid
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield from tree(int(child))


def peak_bytes(pid: int) -> int:
    """Peak resident memory of a process so far."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def write_model(name: str, folder: Path) -> Path:
    """The model in bf16, which both programs read."""
    from lowlat import api
    from lowlat.checkpoint.load import load_model
    from lowlat.checkpoint.save import save_model

    path = api.prepare(name)
    loaded = load_model(path, dtype="bf16")
    save_model(loaded.model, loaded.config, folder, source=path)
    return folder


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Interleaved rounds of all peers, after one that warms up."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = write_model(arguments.model, folder / "model")
        arguments = argparse.Namespace(**vars(arguments) | {"model": model})
        texts = prompts(64, arguments.prompt // 4)
        lines = [json.dumps({"prompt": text}) + "\n" for text in texts]
        (folder / "prompts.jsonl").write_text("".join(lines))
        (folder / "reward.py").write_text(REWARD)
        workers = {name: Worker(name, folder, arguments) for name in arguments.peers}
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
        for round_ in range(arguments.rounds + 1):
            for name, worker in workers.items():
                samples[name].append(worker.step())
                print(f"round {round_}, {name}: {samples[name][-1]}", file=sys.stderr)
        for worker in workers.values():
            worker.end()
    return {name: summary(found) for name, found in samples.items()}


def summary(found: list[dict[str, float]]) -> dict[str, Any]:
    rates = [sample["tokens"] / sample["seconds"] for sample in found[1:]]
    return {
        "tokens_per_second": statistics.median(rates),
        "rates": rates,
        "tokens": [sample["tokens"] for sample in found[1:]],
        "seconds": [sample["seconds"] for sample in found[1:]],
        "peak_bytes": max(sample["peak_bytes"] for sample in found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="minnow", help="name or folder, in Hugging Face layout")
    parser.add_argument("--batch", type=int, default=32, help="completions per step")
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--group", type=int, default=8, help="completions per prompt")
    parser.add_argument("--prompt", type=int, default=128, help="most tokens of a prompt")
    parser.add_argument("--completion", type=int, default=128, help="most tokens of a completion")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--trl-precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS)
    parser.add_argument("--out", type=Path, help="folder for results.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return run_lowlat(arguments) if arguments.worker == "lowlat" else run_trl(arguments)
    found: dict[str, Any] = results_file.heading()
    options = {k: v for k, v in vars(arguments).items() if k not in LEFT_OUT}
    found["arguments"] = options
    found["peers"] = measure(arguments)
    for name, own in found["peers"].items():
        memory = own["peak_bytes"] / 2**20
        print(f"{name:8} {own['tokens_per_second']:8.1f} tokens/s  peak {memory:6.0f} MiB")
    if arguments.out:
        results_file.write(found, arguments.out)


if __name__ == "__main__":
    main()
