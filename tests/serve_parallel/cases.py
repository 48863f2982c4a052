"""Models, options and requests whose results must not depend on the layout of processes."""

import hashlib
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType

from lowlat.checkpoint.save import save_model
from lowlat.config.model import MLAConfig, ModelConfig, QuantConfig
from lowlat.config.serving_layout import ServingLayout
from lowlat.engine.parallel_runner import ParallelRunner
from lowlat.generate.model import Model
from lowlat.generate.params import SamplingParams
from lowlat.model.transformer import Transformer
from lowlat.plan.serving.layout import check_layout
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError
from tests.configs import GQA, PLAIN_MOE
from tests.fakes import MLA, gqa_config, mla_config, tiny_model
from tests.lora import drawn_updates, save_adapter
from tests.unit.checkpoint.builders import INDEXER, SPARSE_GLM, mla, random_model
from tests.unit.checkpoint.gguf_files import write_gguf

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
BLOCKS = mla_config(
    attention=MLAConfig(
        num_attention_heads=4,
        kv_lora_rank=64,
        q_lora_rank=32,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=32,
    ),
    num_hidden_layers=3,
    **(SIZES | {"hidden_size": 256, "intermediate_size": 256, "vocab_size": 64}),
)
"""Every projection has whole blocks in both halves."""
SPARSE_HEADS = replace(SPARSE_GLM, num_attention_heads=4)
SHARED = replace(SPARSE_HEADS, indexer=replace(INDEXER, rope_interleave=True, is_shared=True))
SPARSE = mla(
    "glm_moe_dsa",
    attention=(SPARSE_HEADS, SHARED, SPARSE_HEADS, SPARSE_HEADS, SHARED),
    num_hidden_layers=5,
    num_nextn_predict_layers=1,
    initializer_range=0.3,
    **(SIZES | {"max_position_embeddings": 512}),
)


QUARTERS = mla_config(
    attention=replace(MLA, num_attention_heads=4),
    moe=replace(PLAIN_MOE, n_routed_experts=8, n_shared_experts=4),
    num_hidden_layers=3,
    **(SIZES | {"vocab_size": 64, "hidden_size": 44, "intermediate_size": 36}),
)
"""Divisible by four."""


def drawn_model(config: ModelConfig) -> Transformer:
    """Random weights, in fp8 blocks with equal scales if `config` has them."""
    if config.quantization is None:
        return tiny_model(config, torch.bfloat16)
    model = random_model(config)
    for name, value in model.state_dict().items():
        if name.endswith("_scale_inv"):
            value.fill_(0.1)
    return model


ALONE = ServingLayout()


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, how it is loaded, and requests of up to `longest` prompt tokens."""

    config: ModelConfig
    options: dict[str, Any] = field(default_factory=dict)
    longest: int = 300
    num_adapters: int = 0
    cache_bytes: int | None = None
    is_stored: bool = False
    """Whether the prefix cache is also on disk."""
    gguf: GGMLQuantizationType | None = None

    def write(self, folder: Path) -> None:
        """The model's files below `folder`."""
        folder.mkdir()
        model = drawn_model(self.config)
        if self.gguf is not None:
            write_gguf(folder / "model.gguf", self.config, model.state_dict(), kind=self.gguf)
            return
        save_model(model, self.config, folder / "model", source=None)
        for number in range(self.num_adapters):
            updates = drawn_updates(model, rank=3 + number, seed=number)
            save_adapter(folder / f"adapter{number}", self.config, updates)

    def arguments(self, folder: Path, layout: ServingLayout = ALONE) -> dict[str, Any]:
        """Arguments of `lowlat.load` for as many pages with any number of pipeline stages."""
        name = folder / ("model" if self.gguf is None else "model.gguf")
        adapters = {f"a{n}": folder / f"adapter{n}" for n in range(self.num_adapters)}
        tokenizer = Tokenizer.absent("these models have no text")
        given = {"name": name, "lora": adapters, "tokenizer": tokenizer, **self.options}
        if self.cache_bytes is not None:
            given["max_cache_bytes"] = self.cache_bytes // layout.pipeline
        if self.is_stored:
            given["prefix_cache_dir"] = folder / f"pages {layout}"
        return given

    def allows(self, layout: ServingLayout) -> bool:
        """Whether `layout` divides the model with the same bits: tensor parallelism, and other
        batches in prefill processes, are for native kernels."""
        try:
            check_layout(self.config, layout)
        except UserError:
            return False
        is_native = self.options.get("dtype") != "fp32"
        if not is_native and (layout.tensor > 1 or layout.prefill > 0):
            return False
        has_blocks = self.config.quantization is not None or self.gguf is not None
        return layout.tensor <= (2 if has_blocks else 4)


CASES: dict[str, Case] = {
    "mtp-moe": Case(config=MTP_MOE, longest=2300, num_adapters=2),
    "small-cache": Case(config=MTP_MOE, options={"context": 256}, cache_bytes=40_000),
    "int8": Case(config=MTP_MOE, options={"dtype": "int8", "cache": "int8"}),
    "int4": Case(config=MTP_MOE, options={"dtype": "int4"}),
    "fp8": Case(config=replace(BLOCKS, quantization=QuantConfig()), options={"dtype": "auto"}),
    "gguf": Case(
        config=replace(
            BLOCKS,
            moe=replace(EXPERTS, moe_intermediate_size=32),
            eos_token_ids=(2,),
            bos_token_id=1,
        ),
        options={"dtype": "auto"},
        gguf=GGMLQuantizationType.Q8_0,
    ),
    "dense": Case(config=DENSE, options={"speculates": False}),
    "lora": Case(config=GROUPED, num_adapters=2),
    "stored": Case(config=GROUPED, is_stored=True),
    "quarters": Case(config=QUARTERS, num_adapters=1, is_stored=True),
    "quarters-int8": Case(config=QUARTERS, options={"dtype": "int8"}),
    "tied-fp32": Case(
        config=replace(GROUPED, tie_word_embeddings=True),
        options={"dtype": "fp32"},
        num_adapters=2,
    ),
    "fp32": Case(config=MTP_MOE, options={"dtype": "fp32"}),
    "sparse": Case(config=SPARSE),
    "sparse-fp32": Case(config=SPARSE, options={"dtype": "fp32"}),
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
            max_tokens=rng.randint(5, 20),
            ignore_eos=True,
            temperature=0.9 * (number % 2),
            seed=number,
            n=1 + number % 4 // 3,
        )
        for number in range(len(prompts))
    ]
    names = [adapters[number % len(adapters)] for number in range(len(prompts))]
    tokens, transferred = [], []
    for _ in range(2):  # the second time prompts are in the prefix cache
        found = model.generate_each(prompts, params, lora=names)
        tokens.append([[list(one.token_ids) for one in each] for each in found])
        connector = model.engine.connector
        transferred.append(0 if connector is None else connector.recorder.snapshot().tokens)
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
        "transferred": transferred,
    }


def stored_tokens(model: Model) -> dict[str, Any]:
    """Tokens after a prompt of several pages, and how many of its tokens were cached."""
    prompt = random.Random(5).choices(range(VOCAB), k=200)
    found = model.generate(prompt, max_tokens=20, ignore_eos=True, temperature=0)
    return {"tokens": list(found.token_ids), "cached": found.usage.cached_tokens}


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
