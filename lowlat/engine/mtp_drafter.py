"""Drafts from the checkpoint's own MTP modules (V3 section 2.2 and 5.4.3).

Owns the modules' rows in the cache and the hidden states they go on from. Module k predicts the
token k + 2 places after a position from the hidden state of module k - 1 there and the embedding of
the token k + 1 places after it. Deeper drafts than there are modules repeat the last one, a place
further on.
"""

import weakref
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowlat.engine.request import Chunk, Sequence
from lowlat.engine.runner import ModelRunner
from lowlat.engine.scheduler import ScheduledChunk


@dataclass(slots=True)
class _Kept:
    """What the modules after the first go on from: module k needs its input at one position before
    the new ones."""

    end: int = -1
    """Position after the last with hidden states."""
    hidden: list[Tensor] = field(default_factory=list)
    """Per module k from 1 on, its input [1, hidden] at position end - k."""


@dataclass(slots=True)
class _Turn:
    """One sequence's part of a round of drafting."""

    work: ScheduledChunk
    hidden: Tensor
    """Output of the module before, [positions, hidden], up to position `end`."""
    end: int
    """Position after the last whose token the step made certain."""
    depth: int
    """Drafts wanted."""
    kept: _Kept
    draft_tokens: list[int] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    """Per module, what it was given."""

    @property
    def sequence(self) -> Sequence:
        return self.work.sequence

    def next_input(self, module: int) -> Tensor:
        """Input of `module`: with the position before the new ones, where that is at hand."""
        if module == 0 or len(self.kept.hidden) < module:
            return self.hidden
        return torch.cat([self.kept.hidden[module - 1], self.hidden])

    def following(self, module: int, count: int) -> list[int]:
        """Tokens module + 1 places after the last `count` positions before `end`, as far as they
        are known or drafted."""
        known = [*self.sequence.tokens, *self.draft_tokens]
        return known[self.end - count + module + 1 : self.end + module + 1]


def takes_part(item: ScheduledChunk, depths: Mapping[Sequence, int]) -> bool:
    """Whether the modules run over this part of a step.

    Sequences that want no draft are left out while they decode, so that what does not pay costs
    nothing; gaps this leaves in the modules' rows only make later drafts worse.
    """
    sequence = item.sequence
    if sequence.finish_reason is not None or not sequence.pages:
        return False
    return sequence.is_prefilling or item.path != "decode" or depths.get(sequence, 0) > 0


class MTPDrafter:
    """Runs the MTP modules after a step, over the tokens that the step made certain."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._num_modules = runner.model.config.num_nextn_predict_layers
        self._kept: weakref.WeakKeyDictionary[Sequence, _Kept] = weakref.WeakKeyDictionary()

    @torch.inference_mode()
    def propose(
        self, parts: SequenceOf[tuple[ScheduledChunk, Tensor]], depths: Mapping[Sequence, int]
    ) -> None:
        """Set drafts; `parts` are the step's work that takes part, with its hidden states,
        `depths` the drafts wanted."""
        turns = [self._turn(item, part, depths.get(item.sequence, 0)) for item, part in parts]
        for module in range(self._num_modules):
            self._run_module(module, turns)
        for turn in turns:
            self._kept[turn.sequence] = self._keep(turn)
        self._repeat_last(turns)
        for turn in turns:
            turn.sequence.draft_tokens = turn.draft_tokens[: turn.depth]

    def _turn(self, item: ScheduledChunk, hidden: Tensor, depth: int) -> _Turn:
        # Rows of drafts that were not kept come last.
        end = min(item.start + item.length, item.sequence.num_cached)
        kept = self._kept.get(item.sequence, _Kept())
        if kept.end != item.start:
            kept = _Kept()
        return _Turn(item, hidden[: end - item.start], end, depth, kept)

    def _run_module(self, module: int, turns: list[_Turn]) -> None:
        """Rows of module `module`, and the draft it makes where one is wanted."""
        active, chunks = [], []
        for turn in turns:
            if len(turn.inputs) < module:
                continue
            given = turn.next_input(module)
            ids = turn.following(module, len(given))
            if ids:
                start = turn.end - len(given)
                active.append(turn)
                chunks.append(self._chunk(turn, ids, start))
                turn.inputs.append(given[: len(ids)])
        if not active:
            return
        inputs = [turn.inputs[module] for turn in active]
        outputs, logits = self._runner.mtp(module, torch.cat(inputs), chunks)
        parts = outputs.split([len(part) for part in inputs])
        best = logits.argmax(dim=-1).tolist()
        for turn, states, token in zip(active, parts, best, strict=True):
            turn.hidden = states
            if turn.depth > 0:
                turn.draft_tokens.append(token)

    def _keep(self, turn: _Turn) -> _Kept:
        """Module k goes on at the position k before the next new one."""
        hidden = []
        for module, given in enumerate(turn.inputs[1:], start=1):
            # A prompt's end cuts the rows of a reading sequence short: the next step starts anew.
            if turn.depth == 0 or len(given) < module:
                return _Kept(end=turn.end)
            hidden.append(given[len(given) - module : len(given) - module + 1])
        return _Kept(end=turn.end, hidden=hidden)

    def _repeat_last(self, turns: list[_Turn]) -> None:
        """Drafts beyond the modules: the last module over its own output, one place further."""
        module = self._num_modules - 1
        active = [t for t in turns if len(t.draft_tokens) == self._num_modules]
        for turn in active:
            turn.hidden = turn.hidden[-1:]
        place = 0
        while True:
            active = [turn for turn in active if self._goes_on(turn, turn.end + place)]
            if not active:
                return
            chunks = [self._chunk(t, t.draft_tokens[-1:], t.end + place) for t in active]
            states = torch.cat([turn.hidden for turn in active])
            outputs, logits = self._runner.mtp(module, states, chunks)
            best = logits.argmax(dim=-1).tolist()
            for turn, own, token in zip(active, outputs.split(1), best, strict=True):
                turn.hidden = own
                turn.draft_tokens.append(token)
            place += 1

    def _goes_on(self, turn: _Turn, position: int) -> bool:
        """Whether one more draft is wanted and there is a row for it."""
        rows = len(turn.sequence.pages) * self._runner.cache.page_size
        return len(turn.draft_tokens) < turn.depth and position < rows

    def _chunk(self, turn: _Turn, ids: list[int], start: int) -> Chunk:
        return Chunk(
            tokens=ids,
            start=start,
            pages=tuple(turn.sequence.pages),
            num_logits=1,
            path=turn.work.path,
        )
