"""Models, options and requests whose results must not depend on the layout of processes."""

import hashlib
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lowlat.checkpoint.save import save_model
from lowlat.config.model import ModelConfig
from lowlat.engine.parallel_runner import ParallelRunner
from lowlat.generate.model import Model
from lowlat.generate.params import SamplingParams
from tests.configs import GQA, PLAIN_MOE
from tests.fakes import MLA, gqa_config, mla_config, tiny_model
from tests.lora import drawn_updates, save_adapter

VOCAB = 62
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 46,
    "intermediate_size": 34,
    "max_position_embeddings": 2600,
}
"""Divisible by two, and by nothing else."""
HEADS = replace(MLA, num_attention_heads=6)
EXPERTS = replace(PLAIN_MOE, n_routed_experts=6, n_shared_experts=2)
MTP_MOE = mla_config(attention=HEADS, moe=EXPERTS, num_hidden_layers=5, **SIZES)
DENSE = mla_config(attention=HEADS, num_hidden_layers=3, num_nextn_predict_layers=0, **SIZES)
GROUPED = gqa_config(
    model_type="qwen2", attention=replace(GQA, qkv_bias=True), num_hidden_layers=4, **SIZES
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, how it is loaded, and requests of up to `longest` prompt tokens."""

    config: ModelConfig
    options: dict[str, Any] = field(default_factory=dict)
    longest: int = 300
    num_adapters: int = 0

    def write(self, folder: Path) -> None:
        """The model's files below `folder`."""
        folder.mkdir()
        model = tiny_model(self.config, torch.bfloat16)
        save_model(model, self.config, folder / "model", source=None)
        for number in range(self.num_adapters):
            updates = drawn_updates(model, rank=3 + number, seed=number)
            save_adapter(folder / f"adapter{number}", self.config, updates)

    def arguments(self, folder: Path) -> dict[str, Any]:
        """Arguments of `lowlat.load`."""
        adapters = {f"a{n}": folder / f"adapter{n}" for n in range(self.num_adapters)}
        return {"name": folder / "model", "lora": adapters, **self.options}


CASES: dict[str, Case] = {
    "mtp-moe": Case(config=MTP_MOE, longest=2300),
    "int8": Case(config=MTP_MOE, options={"dtype": "int8", "cache": "int8"}),
    "dense": Case(config=DENSE, options={"speculates": False}),
    "lora": Case(config=GROUPED, num_adapters=2),
    "fp32": Case(config=MTP_MOE, options={"dtype": "fp32"}),
}


def outcome(model: Model, case: Case) -> dict[str, Any]:
    """Results of a model: tokens of many requests, digests of logits."""
    rng = random.Random(3)

    def drawn(count: int) -> list[int]:
        return [rng.randrange(VOCAB) for _ in range(count)]

    opening, longest = drawn(150), min(case.longest, model.context - 100)
    lengths = [1, 5, 33, 64, 130, longest]
    prompts = [drawn(length) for length in lengths] + [opening + drawn(9) for _ in range(3)]
    prompts = [prompt[: model.context - 60] for prompt in prompts]
    adapters = [None, *(f"a{number}" for number in range(case.num_adapters))]
    params = [
        SamplingParams(
            max_tokens=rng.randint(5, 40),
            ignore_eos=True,
            temperature=0.9 * (number % 2),
            seed=number,
            n=1 + number % 4 // 3,
        )
        for number in range(len(prompts))
    ]
    names = [adapters[number % len(adapters)] for number in range(len(prompts))]
    # Twice: the second time prompts are in the prefix cache.
    tokens = [
        [[list(one.token_ids) for one in each] for each in found]
        for found in (model.generate_each(prompts, params, lora=names) for _ in range(2))
    ]
    model.engine.check_integrity()
    ids = drawn(min(90, model.context))
    logits = [model.logits(ids)]
    if model.config.num_nextn_predict_layers:
        logits += model.mtp_logits(ids)
    return {
        "tokens": tokens,
        "logits": [digest(each) for each in logits],
        "nll": float(model.nll(ids).sum()),
        "preemptions": model.engine.scheduler.num_preemptions,
    }


TRAFFIC_PROMPT, TRAFFIC_TOKENS = 20, 9


def traffic(runner: ParallelRunner, model: Model) -> dict[str, int]:
    """What process 0 sends for one request without draft tokens."""
    sent = runner.group.traffic
    before = replace(sent)
    prompt = random.Random(8).choices(range(VOCAB), k=TRAFFIC_PROMPT)
    model.generate(prompt, max_tokens=TRAFFIC_TOKENS, ignore_eos=True, temperature=0)
    return {"messages": sent.messages - before.messages, "bytes": sent.bytes - before.bytes}


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of the bits of a tensor."""
    return hashlib.sha256(bytes(tensor.contiguous().view(-1).view(torch.uint8))).hexdigest()
