"""Whether the programs compute the same function, before any is timed.

In fp32, on a short prompt of random tokens, every logit must agree with lowlat's to TOLERANCE of
the largest; in the precision that is timed, which other kernels may compute, lowlat's own must be
as near as rounding leaves them, on longer prompts too, as other forms of attention read those.
vLLM has no fp32 experts and takes minutes to start: there the likeliest tokens that the worker to
be timed names, in bf16, are compared.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowlat.bench.programs import Program
from lowlat.bench.protocol import token_ids
from lowlat.bench.stage import Stage
from lowlat.bench.worker import Refused, Worker
from lowlat.utils.errors import UserError

PROMPT_TOKENS = 24
OWN_TOKENS = (PROMPT_TOKENS, 48, 256)
"""Of prompts that lowlat's own precision is checked on: the usual sizes of attention read them as a
stream, absorbed and expanded.
"""
CHECK_CONTEXT = OWN_TOKENS[-1] + 64
TOLERANCE = 1e-4
LARGEST_ERROR = {"fp32": 1e-4, "bf16": 0.2, "fp8": 0.4, "int8": 0.4, "int4": 0.8}
"""`relative_error` of lowlat's logits by the coarser dtype timed, of weights or cache: twice to
three times what rounding costs a model of random weights, and less than any logits that are not its
own.
"""
LOGPROB_TOLERANCE = 0.1
"""In nats: bf16 against fp32, where single experts may be chosen differently."""

Array = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """What the check found."""

    ids: list[int]
    """Of the longest prompt; peers read the first PROMPT_TOKENS."""
    reference: Array
    """lowlat's logits of them in fp32, [tokens, vocab]."""
    differences: dict[str, float]
    """Largest difference by program: relative to the largest logit, or in nats (vllm)."""

    def error(self, worker: Worker, lengths: Sequence[int] = (PROMPT_TOKENS,)) -> float:
        """The largest `relative_error` of the worker's logits over prompts of these lengths."""
        return max(
            relative_error(logits_of(worker, self.ids[:length]), self.reference[:length])
            for length in lengths
        )


def check(stage: Stage, programs: Sequence[Program]) -> Checked:
    """Compare all programs but vLLM with the first one.

    Raises UserError where one disagrees or fails.
    """
    reference, *peers = (program for program in programs if program.name != "vllm")
    tokens = min(OWN_TOKENS[-1], stage.config.max_position_embeddings)
    ids = token_ids(tokens, stage.config.vocab_size)
    with stage.progress.task("checking in fp32", 1 + len(peers)) as task:
        expected = _fp32_logits(stage, reference, ids)
        task.advance()
        differences: dict[str, float] = {}
        for peer in peers:
            differences[peer.name] = _logit_difference(
                stage, peer, ids[:PROMPT_TOKENS], expected[:PROMPT_TOKENS]
            )
            task.advance()
    return Checked(ids=ids, reference=expected, differences=differences)


def relative_error(found: Array, expected: Array) -> float:
    """Root mean square of the difference over that of `expected`."""
    error = found.astype(np.float64) - expected
    return float(np.sqrt((error**2).mean() / (expected.astype(np.float64) ** 2).mean()))


def require_near(error: float, dtype: str, cache: str) -> None:
    """Raises UserError where lowlat's logits in `dtype` over rows in `cache` are further from fp32
    than rounding.
    """
    limit = max(LARGEST_ERROR[dtype], LARGEST_ERROR[cache])
    if not error <= limit:
        # Native kernels do not compute in fp32: there only the cache rounds.
        native = "LOWLAT_ISA=none leaves the native kernels out"
        remedy = "--cache auto rounds no rows" if dtype == "fp32" else native
        raise UserError(
            f"lowlat's logits in {dtype} with a cache in {cache} differ from fp32 by {error:.1e} "
            f"of their size, more than {limit:g}; nothing was timed: {remedy}"
        )


def logits_of(worker: Worker, ids: Sequence[int]) -> Array:
    """The worker's logits of `ids`, [tokens, vocab]; they come by way of a file."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "logits.npy"
        worker.ask("logits", ids=list(ids), path=str(path))
        return np.load(path, allow_pickle=False)


def _logit_difference(stage: Stage, program: Program, ids: list[int], expected: Array) -> float:
    try:
        found = _fp32_logits(stage, program, ids)
    finally:
        stage.forget("fp32")
    worst = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not worst <= TOLERANCE:
        raise UserError(
            f"{program.name} and lowlat disagree in fp32: logits differ by {worst:.1e} of the "
            f"largest, more than {TOLERANCE:.0e}; nothing was timed"
        )
    return worst


def top_difference(worker: Worker, checked: Checked) -> float:
    """Largest difference in nats of its likeliest tokens. Raises UserError if it is too large."""
    answer = worker.ask("top", ids=checked.ids[:PROMPT_TOKENS])
    row = checked.reference[:PROMPT_TOKENS][-1].astype(np.float64)
    logprobs = row - row.max() - np.log(np.exp(row - row.max()).sum())
    errors = [abs(value - logprobs[int(token)]) for token, value in answer["logprobs"].items()]
    worst = float(max(errors))
    if not worst <= LOGPROB_TOLERANCE:
        raise UserError(
            f"{worker.name} and lowlat disagree: its likeliest tokens differ by {worst:.2f} nats, "
            f"more than {LOGPROB_TOLERANCE}; nothing was timed"
        )
    return worst


def _fp32_logits(stage: Stage, program: Program, ids: list[int]) -> Array:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "logits.npy"
        _ask(stage, program, "logits", ids=ids, path=str(path))
        return np.load(path, allow_pickle=False)


def _ask(stage: Stage, program: Program, op: str, **arguments: Any) -> None:
    """One request to a worker that has the model in fp32."""
    try:
        loaded = stage.load(program, dtype="fp32", cache="fp32", context=CHECK_CONTEXT)
        with loaded.worker as worker:
            worker.ask(op, **arguments)
    except Refused as refused:
        remedy = "run it alone" if program.name == "lowlat" else "leave it out of --peers"
        raise UserError(f"{program.name} cannot be checked ({refused}); {remedy}") from refused
