"""Agreement check: all programs compute the same function before any is timed.

In fp32, on a short random prompt, the logits of every program must match lowlat's within TOLERANCE
of the largest logit. In the timed precision, which uses other kernels, lowlat's logits must be
within rounding error of its fp32 ones, also for longer prompts, which use the other attention
paths. vLLM has no fp32 experts and takes minutes to start, so the top log-probabilities of its
timed bf16 worker are compared instead.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowlat.bench.benchmark_plan import STORED, Program
from lowlat.bench.session import BenchmarkSession
from lowlat.peers.protocol import random_token_ids
from lowlat.peers.worker import PeerError, Worker
from lowlat.utils.errors import UserError

PROMPT_TOKENS = 24
OWN_TOKENS = (PROMPT_TOKENS, 48, 256)
"""Prompt lengths to check lowlat's own precision: with common attention sizes, one for each
attention path (decode, absorbed, expanded).
"""
CHECK_CONTEXT = OWN_TOKENS[-1] + 64
TOLERANCE = 1e-4
LARGEST_ERROR = {"fp32": 1e-4, "bf16": 0.2, STORED: 0.2, "fp8": 0.4, "int8": 0.4, "int4": 0.8}
"""Largest `relative_error` of lowlat's logits, by the coarser timed dtype of weights and KV cache:
two to three times the rounding error of a model of random weights, and below the error of any wrong
logits.
"""
LOGPROB_TOLERANCE = 0.1
"""Largest difference in nats of bf16 from fp32, in which a few tokens select other experts."""

Array = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """The reference logits, and the difference of each program from them."""

    ids: list[int]
    """Tokens of the longest prompt; peers run the first PROMPT_TOKENS."""
    reference: Array
    """lowlat's fp32 logits of `ids`, [tokens, vocab]."""
    differences: dict[str, float]
    """Largest difference by program: relative to the largest logit, or in nats (vLLM)."""

    def error(self, worker: Worker, lengths: Sequence[int] = (PROMPT_TOKENS,)) -> float:
        """The largest `relative_error` of the worker's logits over prompts of these lengths."""
        return max(
            relative_error(logits_of(worker, self.ids[:length]), self.reference[:length])
            for length in lengths
        )


def check_agreement(session: BenchmarkSession, programs: Sequence[Program]) -> Agreement:
    """Compare all programs but vLLM with the first one in fp32.

    Raises UserError if a program disagrees or fails.
    """
    reference, *peers = (program for program in programs if program.name != "vllm")
    tokens = min(OWN_TOKENS[-1], session.inputs.config.max_position_embeddings)
    ids = random_token_ids(tokens, session.inputs.config.vocab_size)
    with session.progress.task("checking in fp32", 1 + len(peers)) as task:
        expected = _fp32_logits(session, reference, ids)
        task.advance()
        differences: dict[str, float] = {}
        for peer in peers:
            differences[peer.name] = _logit_difference(
                session, peer, ids[:PROMPT_TOKENS], expected[:PROMPT_TOKENS]
            )
            task.advance()
    return Agreement(ids=ids, reference=expected, differences=differences)


def relative_error(found: Array, expected: Array) -> float:
    """Root mean square of the difference over that of `expected`."""
    error = found.astype(np.float64) - expected
    return float(np.sqrt((error**2).mean() / (expected.astype(np.float64) ** 2).mean()))


def require_near(error: float, dtype: str, cache: str) -> None:
    """Raises UserError if the error of lowlat's logits in `dtype`, with a KV cache in `cache`,
    exceeds rounding error.
    """
    limit = max(LARGEST_ERROR[dtype], LARGEST_ERROR[cache])
    if not error <= limit:
        # fp32 runs without native kernels, so only the KV cache rounds.
        native = "LOWLAT_ISA=none disables the native kernels"
        remedy = "--cache auto does not quantize the cache" if dtype == "fp32" else native
        raise UserError(
            f"lowlat's logits in {dtype} with a cache in {cache} differ from fp32 by {error:.1e} "
            f"of their size, more than {limit:g}; nothing was timed: {remedy}"
        )


def logits_of(worker: Worker, ids: Sequence[int]) -> Array:
    """The worker's logits of `ids`, [tokens, vocab], passed through a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "logits.npy"
        worker.ask("logits", ids=list(ids), path=str(path))
        return np.load(path, allow_pickle=False)


def _logit_difference(
    session: BenchmarkSession, program: Program, ids: list[int], expected: Array
) -> float:
    try:
        found = _fp32_logits(session, program, ids)
    finally:
        session.remove_gguf("fp32")
    worst = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not worst <= TOLERANCE:
        raise UserError(
            f"{program.name} and lowlat disagree in fp32: logits differ by {worst:.1e} of the "
            f"largest, more than {TOLERANCE:.0e}; nothing was timed"
        )
    return worst


def top_difference(worker: Worker, agreement: Agreement) -> float:
    """Largest difference of the worker's top log-probabilities, in nats. Raises UserError above
    LOGPROB_TOLERANCE.
    """
    answer = worker.ask("top_logprobs", ids=agreement.ids[:PROMPT_TOKENS])
    row = agreement.reference[:PROMPT_TOKENS][-1].astype(np.float64)
    logprobs = row - row.max() - np.log(np.exp(row - row.max()).sum())
    errors = [abs(value - logprobs[int(token)]) for token, value in answer["logprobs"].items()]
    worst = float(max(errors))
    if not worst <= LOGPROB_TOLERANCE:
        raise UserError(
            f"{worker.name} and lowlat disagree: its top log-probabilities differ by {worst:.2f} "
            f"nats, more than {LOGPROB_TOLERANCE}; nothing was timed"
        )
    return worst


def _fp32_logits(session: BenchmarkSession, program: Program, ids: list[int]) -> Array:
    try:
        loaded = session.load(program, dtype="fp32", cache="fp32", context=CHECK_CONTEXT)
        with loaded.worker as worker:
            return logits_of(worker, ids)
    except PeerError as error:
        remedy = "run it alone" if program.name == "lowlat" else "leave it out of --peers"
        raise UserError(f"{program.name} cannot be checked ({error}); {remedy}") from error
