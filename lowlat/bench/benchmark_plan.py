"""Benchmark plan: the cases, programs and precisions of a run, validated before it starts."""

import os
import re
import shutil
import sys
from dataclasses import dataclass, replace
from typing import Literal

from lowlat.ops import native
from lowlat.utils.errors import UserError

STORED = "stored"
"""Weights quantized in their file, timed as they are: GGUF blocks, vendors' low-bit types."""
DTYPES = ("auto", "bf16", "int8", "int4", "fp8", "fp32")
CACHES = ("auto", "bf16", "int8")
QUANTIZED = (STORED, "int8", "int4")
"""Weights that stay as their checkpoint has them."""
PEERS = ("transformers", "llama.cpp", "vllm")
PREFILL = "512,2048,8192"
DECODE = "128,2048,8192,32768"
ROUNDS = 3
LONGEST = 1 << 20
GGUF_KINDS = {"fp32": "F32", "bf16": "BF16", "int8": "Q8_0", "int4": "Q4_K_M", "fp8": "Q8_0"}
"""llama.cpp's nearest format to each dtype; it has no fp8."""

Kind = Literal["prefill", "decode"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkCase:
    """Prefill of `tokens`, or decode steps with `tokens` entries in the KV cache."""

    kind: Kind
    tokens: int

    def __str__(self) -> str:
        return f"{self.kind} {self.tokens:,}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """lowlat or a peer, and the Python interpreter that has it."""

    name: str
    python: str

    def precision(self, dtype: str) -> str:
        """The program's own name for weights of `dtype`."""
        return GGUF_KINDS.get(dtype, dtype) if self.name == "llama.cpp" else dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkPlan:
    """What a benchmark run measures."""

    cases: tuple[BenchmarkCase, ...]
    """Cases in measuring order."""
    dtype: str = "auto"
    """Precision of lowlat's weights; peers use their nearest one. `for_weights` resolves "auto"."""
    cache: str = "bf16"
    """Data type of the KV cache."""
    threads: int
    """CPU threads of every program."""
    peers: tuple[Program, ...] = ()
    rounds: int = ROUNDS
    """Every program measures every case once per round."""
    default_kinds: tuple[Kind, ...] = ()
    """Kinds of cases with default lengths."""

    def within(self, context: int) -> "BenchmarkPlan":
        """The plan without default lengths beyond `context`."""
        kept = [c for c in self.cases if c.tokens <= context or c.kind not in self.default_kinds]
        return replace(self, cases=tuple(kept or self.cases))

    def for_weights(self, stored: str) -> "BenchmarkPlan":
        """The plan with `stored`, the dtype of the checkpoint's weights, in place of "auto".

        Raises UserError for a dtype as which quantized weights cannot be timed.
        """
        if self.dtype == "auto":
            return replace(self, dtype=stored)
        if stored in QUANTIZED and self.dtype not in (stored, "fp32"):
            name = "quantized" if stored == STORED else stored
            raise UserError(
                f"--dtype {self.dtype}: the weights are {name} and stay so; leave it out"
            )
        return self

    @property
    def context(self) -> int:
        """Largest number of tokens in the KV cache after a case."""
        return max(case.tokens for case in self.cases)


def make_plan(
    *,
    prefill: str | None = None,
    decode: str | None = None,
    dtype: str = "auto",
    cache: str = "auto",
    threads: int | None = None,
    peers: str = "",
    rounds: int = ROUNDS,
) -> BenchmarkPlan:
    """Parse and validate the options. Cache "auto" is fp32 for fp32 weights, else bf16; lengths of
    None are PREFILL and DECODE, limited to the model's context by `within`.

    Raises UserError naming the wrong option.
    """
    for option, value, known in (("--dtype", dtype, DTYPES), ("--cache", cache, CACHES)):
        if value not in known:
            raise UserError(f"{option} '{value}' is unknown; choose one of {', '.join(known)}")
    if dtype == "fp32" and cache == "bf16":
        raise UserError("--cache bf16: --dtype fp32 has an fp32 cache; leave --cache out")
    plain = "fp32" if dtype == "fp32" else "bf16"
    if rounds < 1:
        raise UserError(f"--rounds {rounds}: give at least 1")
    given: dict[Kind, str | None] = {"prefill": prefill, "decode": decode}
    lengths_by_kind: dict[Kind, str] = {
        "prefill": PREFILL if prefill is None else prefill,
        "decode": DECODE if decode is None else decode,
    }
    cases = [
        BenchmarkCase(kind=kind, tokens=n)
        for kind, lengths in lengths_by_kind.items()
        for n in parse_lengths(f"--{kind}", lengths)
    ]
    if not cases:
        raise UserError("--prefill and --decode are both empty; give at least one length")
    return BenchmarkPlan(
        cases=tuple(cases),
        dtype=dtype,
        cache=plain if cache == "auto" else cache,
        threads=check_threads(threads),
        peers=parse_peers(peers),
        rounds=rounds,
        default_kinds=tuple(kind for kind, lengths in given.items() if lengths is None),
    )


def parse_lengths(option: str, text: str) -> list[int]:
    """`"512,2048"` -> [512, 2048], sorted, without duplicates."""
    lengths = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if not re.fullmatch(r"[0-9]{1,9}", part) or not 1 <= int(part) <= LONGEST:
            raise UserError(
                f"{option} '{part}': give numbers of tokens from 1 to {LONGEST:,}, such as 512,2048"
            )
        lengths.append(int(part))
    return sorted(set(lengths))


def parse_peers(text: str) -> tuple[Program, ...]:
    """`"transformers,llama.cpp=/path/to/python"` -> peers; without a path, this interpreter."""
    found: dict[str, Program] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, given, python = part.partition("=")
        if name not in PEERS:
            raise UserError(f"--peers '{name}' is unknown; choose from {', '.join(PEERS)}")
        if name in found:
            raise UserError(f"--peers names {name} twice; give it once")
        path = os.path.expanduser(python) if given else sys.executable
        if shutil.which(path) is None:
            raise UserError(
                f"--peers {name}: '{python}' is not a program; give the interpreter that has "
                f"{name}, such as {name}=/path/to/venv/bin/python"
            )
        found[name] = Program(name=name, python=path)
    return tuple(found.values())


def parse_threads(text: str) -> list[int]:
    """`"1,2,4"` -> [1, 2, 4], sorted, without duplicates. Raises UserError."""
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not re.fullmatch(r"[0-9]{1,5}", part):
            raise UserError(f"--threads '{part}': give numbers of threads, such as 1,2,4")
    return sorted({check_threads(int(part)) for part in parts})


def check_threads(threads: int | None) -> int:
    """`threads`, by default one per core. Raises UserError for more than there are cores."""
    cores = native.processors()
    if threads is None:
        return cores
    if not 1 <= threads <= cores:
        raise UserError(f"--threads {threads}: this machine has {cores} cores; give 1 to {cores}")
    return threads
