"""Scoring: logits and negative log-likelihoods of given tokens, through the paged KV cache.

Owns the chunking and the sums. Text and windows of text are `generate.model`'s.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from lowlat.attention.path import choose_path
from lowlat.engine.request import Chunk
from lowlat.engine.runner import ModelRunner
from lowlat.model.lora import NO_ADAPTER

WINDOW = 1024
"""Default tokens of a window; the model's context if that is shorter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """Perplexity of a model on a text."""

    window: int
    """Tokens of a window."""
    tokens: int
    """Tokens predicted: all but the first of each window."""
    bytes: int
    """Bytes of text in them."""
    nll: float
    """Sum of their negative log-likelihoods in nats."""

    @property
    def perplexity(self) -> float:
        """exp(nll / tokens); infinite beyond the range of a float, from 710 nats a token on."""
        try:
            return math.exp(self.nll / self.tokens)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits the model needs per byte of text: comparable between tokenizers; NaN for no text."""
        return math.nan if self.bytes == 0 else self.nll / math.log(2.0) / self.bytes


def logits(
    runner: ModelRunner, ids: Sequence[int], *, chunk: int, lora_int_id: int = NO_ADAPTER
) -> Float[Tensor, "tokens vocab"]:
    """Raw logits after each of `ids`, at least fp32, computed `chunk` tokens at a time."""
    out: Tensor | None = None
    for start, rows in _chunks(runner, ids, chunk, lora_int_id):
        if out is None:
            # Made outside inference mode, so that callers may change it in place.
            out = torch.empty(len(ids), rows.shape[1], dtype=rows.dtype, device=rows.device)
        out[start : start + len(rows)] = rows
    assert out is not None, "no tokens"
    return out


def mtp_logits(
    runner: ModelRunner, ids: Sequence[int], *, chunk: int
) -> list[Float[Tensor, "tokens vocab"]]:
    """Raw logits of every MTP depth k, at least fp32: [max(0, tokens - 1 - k), vocab].

    Row i of depth k predicts token i + 2 + k.
    """
    depths = runner.model.config.num_nextn_predict_layers
    pieces: list[list[Tensor]] = [[] for _ in range(depths)]
    pages: list[int] = []
    try:
        for start in range(0, len(ids), chunk):
            end = min(start + chunk, len(ids))
            runner.reserve(pages, end)
            part = _chunk(runner, ids[start:end], start, pages)
            _, hidden = runner.step([part])
            for depth in range(depths):
                ahead = ids[start + 1 + depth : end + 1 + depth]
                hidden = hidden[: len(ahead)]
                if len(ahead) > 0:
                    following = replace(part, tokens=ahead, num_logits=len(ahead))
                    hidden, rows = runner.mtp(depth, hidden, [following])
                    pieces[depth].append(rows)
    finally:
        runner.release(pages)
    empty = torch.empty(0, runner.model.config.vocab_size)
    return [torch.cat(found) if found else empty for found in pieces]


def nll(runner: ModelRunner, ids: Sequence[int], *, chunk: int) -> Float[Tensor, " predicted"]:
    """Negative log-likelihood (nats, fp64, on the CPU) of each of `ids` but the first."""
    pieces = []
    for start, rows in _chunks(runner, ids, chunk):
        targets = torch.tensor(
            ids[start + 1 : start + 1 + len(rows)], dtype=torch.int64, device=rows.device
        )
        chosen = torch.log_softmax(rows[: len(targets)], dim=-1).gather(1, targets[:, None])
        pieces.append(-chosen.flatten().cpu().double())
    return torch.cat(pieces)


def _chunks(
    runner: ModelRunner, ids: Sequence[int], chunk: int, lora_int_id: int = NO_ADAPTER
) -> Iterator[tuple[int, Tensor]]:
    """(start, logits [length, vocab]) of successive chunks; releases the pages at the end."""
    pages: list[int] = []
    try:
        for start in range(0, len(ids), chunk):
            tokens = ids[start : start + chunk]
            runner.reserve(pages, start + len(tokens))
            part = _chunk(runner, tokens, start, pages)
            part = replace(part, num_logits=len(tokens), lora_int_id=lora_int_id)
            yield start, runner.run([part])
    finally:
        runner.release(pages)


def _chunk(runner: ModelRunner, tokens: Sequence[int], start: int, pages: list[int]) -> Chunk:
    path = choose_path(runner.model.config.attention, len(tokens))
    return Chunk(tokens=tokens, start=start, pages=tuple(pages), num_logits=0, path=path)
