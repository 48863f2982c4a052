"""MTP draft model: draft tokens from the checkpoint's modules (DeepSeek-V3 sections 2.2 and 5.4.3).

Owns the modules' KV cache entries and the hidden states they continue from. Module k predicts the
token k + 2 places after a position from the hidden state of module k - 1 there and the embedding of
the token k + 1 places after it. Draft tokens beyond the number of modules repeat the last module,
one place ahead each.
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
class _DraftState:
    """State from which the modules after the first continue: module k needs its input at one
    position before the new ones."""

    end: int = -1
    """Position after the last with hidden states."""
    hidden: list[Tensor] = field(default_factory=list)
    """Per module k from 1 on, its input [1, hidden] at position end - k."""


@dataclass(slots=True)
class _Draft:
    """One sequence's part of a drafting round."""

    work: ScheduledChunk
    hidden: Tensor
    """Output of the module before, [positions, hidden], up to position `end`."""
    end: int
    """Position after the last cached token: the step has fixed the tokens before it."""
    num_drafts: int
    """Number of draft tokens wanted."""
    state: _DraftState
    draft_tokens: list[int] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    """Per module, its input."""

    @property
    def sequence(self) -> Sequence:
        return self.work.sequence

    def next_input(self, module: int) -> Tensor:
        """Input of `module`: with the position before the new ones, if it is stored."""
        if module == 0 or len(self.state.hidden) < module:
            return self.hidden
        return torch.cat([self.state.hidden[module - 1], self.hidden])

    def following(self, module: int, count: int) -> list[int]:
        """Tokens module + 1 places after the last `count` positions before `end`, as far as they
        are sampled or drafted."""
        known = [*self.sequence.tokens, *self.draft_tokens]
        return known[self.end - count + module + 1 : self.end + module + 1]


def takes_part(item: ScheduledChunk, num_drafts: Mapping[Sequence, int]) -> bool:
    """Whether the MTP modules run over this chunk of a step.

    Decoding sequences without draft tokens are skipped and cost nothing; the gaps in the modules'
    KV cache entries only lower later acceptance.
    """
    sequence = item.sequence
    if sequence.finish_reason is not None or not sequence.pages:
        return False
    return sequence.is_prefilling or item.path != "decode" or num_drafts.get(sequence, 0) > 0


class MTPDrafter:
    """Runs the MTP modules after a step, over the tokens that the step has fixed."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._num_modules = runner.model.config.num_nextn_predict_layers
        self._states: weakref.WeakKeyDictionary[Sequence, _DraftState] = weakref.WeakKeyDictionary()

    @torch.inference_mode()
    def propose(
        self, parts: SequenceOf[tuple[ScheduledChunk, Tensor]], num_drafts: Mapping[Sequence, int]
    ) -> None:
        """Set draft tokens. parts: the step's chunks that take part, with their hidden states.
        num_drafts: draft tokens wanted."""
        drafts = [self._begin(item, part, num_drafts.get(item.sequence, 0)) for item, part in parts]
        for module in range(self._num_modules):
            self._run_module(module, drafts)
        for draft in drafts:
            self._states[draft.sequence] = self._state_after(draft)
        self._repeat_last(drafts)
        for draft in drafts:
            draft.sequence.draft_tokens = draft.draft_tokens[: draft.num_drafts]

    def _begin(self, item: ScheduledChunk, hidden: Tensor, wanted: int) -> _Draft:
        # Hidden states of rejected draft tokens come last.
        end = min(item.start + item.length, item.sequence.num_cached)
        kept = self._states.get(item.sequence, _DraftState())
        if kept.end != item.start:
            kept = _DraftState()
        return _Draft(item, hidden[: end - item.start], end, wanted, kept)

    def _run_module(self, module: int, drafts: list[_Draft]) -> None:
        """Compute the KV cache entries of `module` and, if wanted, the draft token it predicts."""
        active, chunks = [], []
        for draft in drafts:
            if len(draft.inputs) < module:
                continue
            given = draft.next_input(module)
            ids = draft.following(module, len(given))
            if ids:
                start = draft.end - len(given)
                active.append(draft)
                chunks.append(self._chunk(draft, ids, start))
                draft.inputs.append(given[: len(ids)])
        if not active:
            return
        inputs = [draft.inputs[module] for draft in active]
        outputs, logits = self._runner.mtp(module, torch.cat(inputs), chunks)
        parts = outputs.split([len(part) for part in inputs])
        best = logits.argmax(dim=-1).tolist()
        for draft, states, token in zip(active, parts, best, strict=True):
            draft.hidden = states
            if draft.num_drafts > 0:
                draft.draft_tokens.append(token)

    def _state_after(self, draft: _Draft) -> _DraftState:
        """Module k continues at the position k before the next new one."""
        hidden = []
        for module, given in enumerate(draft.inputs[1:], start=1):
            # A prefill chunk ended too early to have this input: the next step starts without it.
            if draft.num_drafts == 0 or len(given) < module:
                return _DraftState(end=draft.end)
            hidden.append(given[len(given) - module : len(given) - module + 1])
        return _DraftState(end=draft.end, hidden=hidden)

    def _repeat_last(self, drafts: list[_Draft]) -> None:
        """Draft tokens beyond the modules: the last module over its own output, one place ahead."""
        module = self._num_modules - 1
        active = [t for t in drafts if len(t.draft_tokens) == self._num_modules]
        for draft in active:
            draft.hidden = draft.hidden[-1:]
        place = 0
        while True:
            active = [draft for draft in active if self._wants_more(draft, draft.end + place)]
            if not active:
                return
            chunks = [self._chunk(t, t.draft_tokens[-1:], t.end + place) for t in active]
            states = torch.cat([draft.hidden for draft in active])
            outputs, logits = self._runner.mtp(module, states, chunks)
            best = logits.argmax(dim=-1).tolist()
            for draft, own, token in zip(active, outputs.split(1), best, strict=True):
                draft.hidden = own
                draft.draft_tokens.append(token)
            place += 1

    def _wants_more(self, draft: _Draft, position: int) -> bool:
        """Whether one more draft token is wanted and the pages have an entry for it."""
        capacity = len(draft.sequence.pages) * self._runner.cache.page_size
        return len(draft.draft_tokens) < draft.num_drafts and position < capacity

    def _chunk(self, draft: _Draft, ids: list[int], start: int) -> Chunk:
        return Chunk(
            tokens=ids,
            start=start,
            pages=tuple(draft.sequence.pages),
            num_logits=1,
            path=draft.work.path,
        )
