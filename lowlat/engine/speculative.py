"""Guesses at the next tokens, verified together in one step: speculative decoding.

Owns where drafts come from (the checkpoint's MTP modules, or what followed the same tokens before)
and how many are worth verifying. Verifying is the engine's, and exact: a draft is kept where it is
the token that the model draws anyway. So a sequence that no drafts can be made for goes on without.
"""

import logging
import time
import weakref
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf

from torch import Tensor

from lowlat.engine.draft_policy import MAX_DRAFT_TOKENS, DraftPolicy
from lowlat.engine.mtp_drafter import MTPDrafter, takes_part
from lowlat.engine.prompt_lookup import PromptLookup
from lowlat.engine.request import Sequence
from lowlat.engine.runner import ModelRunner
from lowlat.engine.scheduler import ScheduledChunk

logger = logging.getLogger(__name__)


class Speculator:
    """Drafts for all sequences of an engine."""

    def __init__(self, runner: ModelRunner) -> None:
        self.depth = DraftPolicy()
        has_mtp = runner.model.config.num_nextn_predict_layers > 0
        self._mtp = MTPDrafter(runner) if has_mtp else None
        self._drafting_seconds = 0.0
        self._lookups: weakref.WeakKeyDictionary[Sequence, PromptLookup] = (
            weakref.WeakKeyDictionary()
        )
        self._given_up: weakref.WeakSet[Sequence] = weakref.WeakSet()

    def propose(self, work: SequenceOf[ScheduledChunk], hidden: Tensor) -> None:
        """Set the drafts of the sequences that have just been part of a step.

        `work` is what the step was, `hidden` [tokens, hidden] the final hidden states of its
        tokens. Where that fails, each sequence is tried alone; one that fails gets no drafts from
        then on.
        """
        going_on = [item for item in work if item.sequence not in self._given_up]
        try:
            self._propose(going_on, work, hidden)
        except Exception as error:
            logger.warning("drafts for %d sequences could not be made: %r", len(going_on), error)
            for item in going_on:
                self._propose_alone(item, work, hidden)

    def _propose_alone(
        self, item: ScheduledChunk, work: SequenceOf[ScheduledChunk], hidden: Tensor
    ) -> None:
        item.sequence.draft_tokens = []
        try:
            self._propose([item], work, hidden)
        except Exception:
            logger.exception("request %d goes on without drafts", item.sequence.request.id)
            self._given_up.add(item.sequence)

    def _propose(
        self, parts: SequenceOf[ScheduledChunk], work: SequenceOf[ScheduledChunk], hidden: Tensor
    ) -> None:
        """Set drafts after some `parts` of a step."""
        decoding = [
            item.sequence
            for item in parts
            if item.sequence.finish_reason is None
            and item.sequence.pages
            and not item.sequence.is_prefilling
        ]
        depths = self.depth.choose({s: _most_drafts(s) for s in decoding})
        self._drafting_seconds = 0.0
        if self._mtp is not None:
            self._run_modules(self._mtp, parts, work, hidden, depths)
            return
        for sequence in decoding:
            if depths[sequence] > 0:
                lookup = self._lookups.setdefault(sequence, PromptLookup())
                sequence.draft_tokens = lookup.propose(sequence.tokens, depths[sequence])

    def _run_modules(
        self,
        mtp: MTPDrafter,
        parts: SequenceOf[ScheduledChunk],
        work: SequenceOf[ScheduledChunk],
        hidden: Tensor,
        depths: Mapping[Sequence, int],
    ) -> None:
        taking_part = {item for item in parts if takes_part(item, depths)}
        if not taking_part:
            return
        started = time.perf_counter()
        states = hidden.split([item.length for item in work])
        own = zip(work, states, strict=True)
        mtp.propose([(item, state) for item, state in own if item in taking_part], depths)
        self._drafting_seconds = time.perf_counter() - started
        # A prompt's rows are made beside the drafts, and are no cost of theirs.
        is_prefilling = any(item.length > 1 + MAX_DRAFT_TOKENS for item in taking_part)
        if not is_prefilling and (total := sum(depths.values())):
            self.depth.drafted(total, self._drafting_seconds)

    def verified(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """So many drafts of a sequence were verified, and so many of them kept."""
        self.depth.verified(sequence, drafted, accepted)

    def stepped(self, num_tokens: int, seconds: float) -> None:
        """A step that read streams only took this long, its making of drafts included."""
        self.depth.stepped(num_tokens, seconds - self._drafting_seconds)


def _most_drafts(sequence: Sequence) -> int:
    """Drafts that could still become output: the step's own token takes one place."""
    return sequence.request.max_outputs - sequence.num_outputs - 1
