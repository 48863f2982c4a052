"""What is to be measured: the options of a run, checked before anything is started."""

import os
import re
import shutil
import sys
from dataclasses import dataclass, replace
from typing import Literal

from lowlat.ops import native
from lowlat.utils.errors import UserError

DTYPES = ("bf16", "int8", "int4", "fp8", "fp32")
CACHES = ("auto", "bf16", "int8")
PEERS = ("transformers", "llama.cpp", "vllm")
PREFILL = "512,2048,8192"
DECODE = "128,2048,8192,32768"
ROUNDS = 3
LONGEST = 1 << 20

Kind = Literal["prefill", "decode"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One thing to measure: reading a prompt of `tokens`, or steps with `tokens` rows cached."""

    kind: Kind
    tokens: int

    def __str__(self) -> str:
        return f"{self.kind} {self.tokens:,}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """Another program to measure, and the interpreter that has it."""

    name: str
    python: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A run."""

    cells: tuple[Cell, ...]
    """In the order of measuring."""
    dtype: str = "bf16"
    """Precision of lowlat's weights; peers use the nearest they have."""
    cache: str = "bf16"
    """Precision of the cached rows."""
    threads: int
    """CPU threads of every program."""
    peers: tuple[Peer, ...] = ()
    rounds: int = ROUNDS
    """Every cell is measured once per round by every program in turn."""
    unasked: tuple[Kind, ...] = ()
    """Kinds whose lengths nobody chose."""

    def within(self, context: int) -> "Plan":
        """Without the lengths beyond `context` that nobody chose."""
        kept = [c for c in self.cells if c.tokens <= context or c.kind not in self.unasked]
        return replace(self, cells=tuple(kept or self.cells))

    @property
    def context(self) -> int:
        """Most rows any cell leaves in the cache."""
        return max(cell.tokens for cell in self.cells)


def make_plan(
    *,
    prefill: str | None = None,
    decode: str | None = None,
    dtype: str = "bf16",
    cache: str = "auto",
    threads: int | None = None,
    peers: str = "",
    rounds: int = ROUNDS,
) -> Plan:
    """The plan behind the options as typed; cache "auto" is fp32 for fp32 weights, else bf16, and
    lengths that are None are PREFILL and DECODE, as far as the model goes.

    Raises UserError naming the option that is wrong.
    """
    for option, value, known in (("--dtype", dtype, DTYPES), ("--cache", cache, CACHES)):
        if value not in known:
            raise UserError(f"{option} '{value}' is unknown; choose one of {', '.join(known)}")
    if dtype == "fp32" and cache == "bf16":
        raise UserError("--cache bf16: what fp32 weights make is cached in fp32; leave it out")
    plain = "fp32" if dtype == "fp32" else "bf16"
    if rounds < 1:
        raise UserError(f"--rounds {rounds}: give at least 1")
    asked: dict[Kind, str | None] = {"prefill": prefill, "decode": decode}
    wanted: dict[Kind, str] = {
        "prefill": PREFILL if prefill is None else prefill,
        "decode": DECODE if decode is None else decode,
    }
    cells = [
        Cell(kind=kind, tokens=n)
        for kind, lengths in wanted.items()
        for n in parse_lengths(f"--{kind}", lengths)
    ]
    if not cells:
        raise UserError("--prefill and --decode are both empty; give at least one length")
    return Plan(
        cells=tuple(cells),
        dtype=dtype,
        cache=plain if cache == "auto" else cache,
        threads=check_threads(threads),
        peers=parse_peers(peers),
        rounds=rounds,
        unasked=tuple(kind for kind, lengths in asked.items() if lengths is None),
    )


def parse_lengths(option: str, text: str) -> list[int]:
    """`"512,2048"` -> [512, 2048], rising, each once."""
    lengths = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if not re.fullmatch(r"[0-9]{1,9}", part) or not 1 <= int(part) <= LONGEST:
            raise UserError(
                f"{option} '{part}': give numbers of tokens from 1 to {LONGEST:,}, such as 512,2048"
            )
        lengths.append(int(part))
    return sorted(set(lengths))


def parse_peers(text: str) -> tuple[Peer, ...]:
    """`"transformers,llama.cpp=/path/to/python"` -> peers; without a path, this interpreter."""
    found: dict[str, Peer] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, given, python = part.partition("=")
        if name not in PEERS:
            raise UserError(f"--peers '{name}' is unknown; choose from {', '.join(PEERS)}")
        if name in found:
            raise UserError(f"--peers names {name} twice; give it once")
        path = os.path.expanduser(python) if given else sys.executable
        if shutil.which(path) is None:
            raise UserError(
                f"--peers {name}: '{python}' is no program; give the Python interpreter that has "
                f"{name}, such as {name}=/path/to/venv/bin/python"
            )
        found[name] = Peer(name=name, python=path)
    return tuple(found.values())


def check_threads(threads: int | None) -> int:
    """`threads`, or one per core. Raises UserError for more than this process may use."""
    cores = native.processors()
    if threads is None:
        return cores
    if not 1 <= threads <= cores:
        raise UserError(
            f"--threads {threads}: this machine offers {cores} cores; give 1 to {cores}"
        )
    return threads
