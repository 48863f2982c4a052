"""Guesses at the next tokens, verified together in one step: speculative decoding.

Owns where drafts come from (the checkpoint's MTP modules, or what followed the same tokens before)
and how many are worth verifying. Verifying is the engine's, and exact: a draft is kept where it is
the token that the model draws anyway. So a sequence that no drafts can be made for goes on without.
"""

import logging
import time
import weakref
from collections.abc import Sequence as SequenceOf

from torch import Tensor

from lowlat.engine.depth import DepthChoice
from lowlat.engine.lookup import PromptLookup
from lowlat.engine.mtp_drafts import MTPDrafter
from lowlat.engine.request import Sequence
from lowlat.engine.runner import Runner
from lowlat.engine.scheduler import Work

logger = logging.getLogger(__name__)


class Speculator:
    """Drafts for all sequences of an engine."""

    def __init__(self, runner: Runner) -> None:
        self.depth = DepthChoice()
        has_mtp = runner.model.config.num_nextn_predict_layers > 0
        self._mtp = MTPDrafter(runner) if has_mtp else None
        self._drafting_seconds = 0.0
        self._lookups: weakref.WeakKeyDictionary[Sequence, PromptLookup] = (
            weakref.WeakKeyDictionary()
        )
        self._given_up: weakref.WeakSet[Sequence] = weakref.WeakSet()

    def propose(self, work: SequenceOf[Work], hidden: Tensor) -> None:
        """Set the drafts of the sequences that have just been part of a step.

        `work` is what the step was, `hidden` [tokens, hidden] the final hidden states of its
        tokens. Where that fails, each sequence is tried alone; one that fails gets no drafts from
        then on.
        """
        states = hidden.split([item.length for item in work])
        parts = [
            (item, part)
            for item, part in zip(work, states, strict=True)
            if item.sequence not in self._given_up
        ]
        try:
            self._propose(parts)
        except Exception as error:
            logger.warning("drafts for %d sequences could not be made: %r", len(parts), error)
            for item, part in parts:
                self._propose_alone(item, part)

    def _propose_alone(self, item: Work, hidden: Tensor) -> None:
        item.sequence.drafts = []
        try:
            self._propose([(item, hidden)])
        except Exception:
            logger.exception("request %d goes on without drafts", item.sequence.request.id)
            self._given_up.add(item.sequence)

    def _propose(self, parts: SequenceOf[tuple[Work, Tensor]]) -> None:
        """Set drafts; each part of the step comes with its hidden states."""
        decoding = [
            item.sequence
            for item, _ in parts
            if item.sequence.finish_reason is None
            and item.sequence.pages
            and not item.sequence.is_reading
        ]
        depths = self.depth.choose({s: _most_drafts(s) for s in decoding})
        self._drafting_seconds = 0.0
        if self._mtp is not None:
            started = time.perf_counter()
            self._mtp.propose(parts, depths)
            self._drafting_seconds = time.perf_counter() - started
            if total := sum(depths.values()):
                self.depth.drafted(total, self._drafting_seconds)
            return
        for sequence in decoding:
            if depths[sequence] > 0:
                lookup = self._lookups.setdefault(sequence, PromptLookup())
                sequence.drafts = lookup.propose(sequence.tokens, depths[sequence])

    def verified(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """So many drafts of a sequence were verified, and so many of them kept."""
        self.depth.verified(sequence, drafted, accepted)

    def stepped(self, num_tokens: int, seconds: float) -> None:
        """A step that read streams only took this long, its making of drafts included."""
        self.depth.stepped(num_tokens, seconds - self._drafting_seconds)


def _most_drafts(sequence: Sequence) -> int:
    """Drafts that could still become output: the step's own token takes one place."""
    return sequence.request.max_outputs - sequence.num_outputs - 1
