"""Forward pass of GRPO by the engine's native kernels: logits are bit-identical to those that were
sampled from, whatever the batch, chunks, prefix cache, preemption or draft tokens were.

A prompt is computed in the engine's own chunks and attention paths, all tokens of a completion in
one call on the decode path.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import BFloat16, Bool, Float, Int
from torch import Tensor

from lowlat.attention.cache import PAGE_SIZE, PagedCache
from lowlat.attention.metadata import AttentionBatch, SequenceSlice
from lowlat.attention.path import AttentionPath
from lowlat.engine.prefill_planner import PREFILL_CHUNK, PrefillPlanner
from lowlat.model.native import KeptActivations, NativeModel
from lowlat.model.native_layers import embedding_of, weight_of
from lowlat.model.transformer import Transformer
from lowlat.ops import native


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicySequence:
    """A prompt and a completion, token ids; both have at least one."""

    prompt: Sequence[int]
    completion: Sequence[int]

    @property
    def inputs(self) -> list[int]:
        """All tokens that predict another: the last one predicts none."""
        return [*self.prompt, *self.completion[:-1]]


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyPass:
    """Activations of packed sequences, with the engine's bits."""

    ids: Int[Tensor, "tokens"]
    lengths: list[int]
    """Inputs of each sequence."""
    kept: KeptActivations | None
    hidden: BFloat16[Tensor, "tokens hidden"]
    """After the final norm."""
    rows: Int[Tensor, "targets"]
    """Tokens that predict a token of a completion."""
    targets: Int[Tensor, "targets"]
    """The tokens that they predict."""
    is_decode: Bool[Tensor, "targets"]
    """Which rows the engine computed on the decode path."""


class TrainerForward(Protocol):
    """A forward pass of the policy, at whose activations the backward pass runs."""

    def refresh(self) -> None:
        """Take over changed weights."""
        ...

    def run(self, sequences: Sequence[PolicySequence], *, keeps: bool = True) -> PolicyPass:
        """Compute `sequences`; keeps: also what a backward pass needs."""
        ...

    def logits(self, run: PolicyPass, part: slice) -> Float[Tensor, "rows vocab"]:
        """The logits, fp32, of a part of `run.rows`."""
        ...


class PolicyForward:
    """Forward passes of `model`, whose weights may change in place between them."""

    def __init__(self, model: Transformer, *, prefill_chunk: int = PREFILL_CHUNK) -> None:
        self._model = model
        self._planner = PrefillPlanner(
            model.config.attention, chunk=prefill_chunk, page_size=PAGE_SIZE
        )
        self.refresh()

    def refresh(self) -> None:
        """Take over changed weights: the kernels have copies of norms and biases."""
        model = self._model
        self._native = NativeModel(model)
        head = model.lm_head
        self._head = embedding_of(model.embed_tokens) if head is None else weight_of(head)

    @torch.no_grad()
    def run(self, sequences: Sequence[PolicySequence], *, keeps: bool = True) -> PolicyPass:
        """Compute `sequences`; keeps: also what a backward pass needs."""
        inputs = [sequence.inputs for sequence in sequences]
        lengths = [len(ids) for ids in inputs]
        ids = torch.tensor([token for own in inputs for token in own])
        config = self._model.config
        kept = KeptActivations.empty(config, len(ids)) if keeps else None
        hidden = torch.empty(len(ids), config.hidden_size, dtype=torch.bfloat16)
        pages, firsts, cache = self._new_cache(lengths)
        for chunks in self._calls(sequences, lengths):
            slices = [
                SequenceSlice(pages=pages[number], start=start, length=length, path=path)
                for number, start, length, path in chunks
            ]
            index = torch.cat(
                [
                    torch.arange(firsts[number] + start, firsts[number] + start + length)
                    for number, start, length, _ in chunks
                ]
            )
            batch = AttentionBatch.build(slices, page_size=PAGE_SIZE)
            own = KeptActivations.empty(config, len(index)) if keeps else None
            hidden[index], _ = self._native.step(ids[index], batch, cache, [], kept=own)
            if kept is not None and own is not None:
                kept.put(index, own)
        rows, targets = predicting(sequences)
        return PolicyPass(
            ids=ids,
            lengths=lengths,
            kept=kept,
            hidden=hidden,
            rows=rows,
            targets=targets,
            is_decode=self._is_decode(sequences),
        )

    @torch.no_grad()
    def logits(self, run: PolicyPass, part: slice) -> Float[Tensor, "rows vocab"]:
        """The logits, fp32, of a part of `run.rows`."""
        hidden, is_decode = run.hidden[run.rows[part]], run.is_decode[part]
        out = torch.empty(len(hidden), self._model.config.vocab_size)
        for path in (False, True):
            index = (is_decode == path).nonzero()[:, 0]
            if len(index):
                product = torch.empty(len(index), out.shape[1])
                native.module().linear(self._head, hidden[index], product, is_decode=path)
                out[index] = product
        return out

    def _new_cache(
        self, lengths: Sequence[int]
    ) -> tuple[list[tuple[int, ...]], list[int], PagedCache]:
        """Pages and first token of each sequence, and an empty KV cache for all."""
        pages, firsts = [], []
        used = tokens = 0
        for length in lengths:
            count = -(-length // PAGE_SIZE)
            pages.append(tuple(range(used, used + count)))
            firsts.append(tokens)
            used, tokens = used + count, tokens + length
        cache = PagedCache(
            self._model.config,
            num_pages=used,
            page_size=PAGE_SIZE,
            dtype=torch.bfloat16,
            attentions=self._model.cached_attentions(),
        )
        return pages, firsts, cache

    def _calls(
        self, sequences: Sequence[PolicySequence], lengths: Sequence[int]
    ) -> Iterator[list[tuple[int, int, int, AttentionPath]]]:
        """Calls of the model: (sequence, start, length, path) of their chunks. The prompts' n-th
        chunks are one call, the completions of all sequences the last.
        """
        chunk = self._planner.chunk
        starts = [0] * len(sequences)
        while True:
            call = []
            for number, own in enumerate(sequences):
                if (start := starts[number]) < (size := len(own.prompt)):
                    length, path = self._planner.next_chunk(start, size, size, chunk)
                    call.append((number, start, length, path))
                    starts[number] += length
            if not call:
                break
            yield call
        call = []
        for number, (own, length) in enumerate(zip(sequences, lengths, strict=True)):
            if length > (size := len(own.prompt)):
                call.append((number, size, length - size, "decode"))
        if call:
            yield call

    def _is_decode(self, sequences: Sequence[PolicySequence]) -> Bool[Tensor, "targets"]:
        """`PolicyPass.is_decode` of `sequences`."""
        found: list[bool] = []
        for own in sequences:
            size = len(own.prompt)
            found.append(self._planner.path(size - 1, size) == "decode")
            found += [True] * (len(own.completion) - 1)
        return torch.tensor(found)


def predicting(
    sequences: Sequence[PolicySequence],
) -> tuple[Int[Tensor, "targets"], Int[Tensor, "targets"]]:
    """Rows of the packed inputs that predict tokens of completions, and these tokens."""
    rows: list[int] = []
    targets: list[int] = []
    first = 0
    for own in sequences:
        last = first + len(own.prompt) - 1
        rows += range(last, last + len(own.completion))
        targets += own.completion
        first += len(own.prompt) + len(own.completion) - 1
    return torch.tensor(rows), torch.tensor(targets)
