"""Speculative decoding: draft tokens from MTP modules or prompt lookup; acceptance by exact match.

Owns drafting: the checkpoint's MTP modules, or prompt lookup (n-gram) for models without them, and
how many draft tokens are worth verifying. `engine.engine` verifies them in the next step: a draft
token is accepted if it equals the token that the model samples anyway, so drafting can fail without
an effect on the output.
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
    """Proposes draft tokens for all sequences of an engine."""

    def __init__(self, runner: ModelRunner) -> None:
        self.policy = DraftPolicy()
        has_mtp = runner.model.config.num_nextn_predict_layers > 0
        self._mtp = MTPDrafter(runner) if has_mtp else None
        self._drafting_seconds = 0.0
        self._lookups: weakref.WeakKeyDictionary[Sequence, PromptLookup] = (
            weakref.WeakKeyDictionary()
        )
        self._given_up: weakref.WeakSet[Sequence] = weakref.WeakSet()

    def propose(self, work: SequenceOf[ScheduledChunk], hidden: Tensor) -> None:
        """Set the draft tokens of the sequences of a step that has just run.

        work: the chunks of the step. hidden: [tokens, hidden], the final hidden states of its
        tokens. If drafting fails, each sequence is tried alone; one that fails again gets no draft
        tokens from then on.
        """
        active = [item for item in work if item.sequence not in self._given_up]
        try:
            self._propose(active, work, hidden)
        except Exception as error:
            logger.warning("drafting for %d sequences failed: %r", len(active), error)
            for item in active:
                self._propose_alone(item, work, hidden)

    def _propose_alone(
        self, item: ScheduledChunk, work: SequenceOf[ScheduledChunk], hidden: Tensor
    ) -> None:
        item.sequence.draft_tokens = []
        try:
            self._propose([item], work, hidden)
        except Exception:
            logger.exception("request %d continues without draft tokens", item.sequence.request.id)
            self._given_up.add(item.sequence)

    def _propose(
        self, parts: SequenceOf[ScheduledChunk], work: SequenceOf[ScheduledChunk], hidden: Tensor
    ) -> None:
        """Set draft tokens for the sequences of some `parts` of a step."""
        decoding = [
            item.sequence
            for item in parts
            if item.sequence.finish_reason is None
            and item.sequence.pages
            and not item.sequence.is_prefilling
        ]
        num_drafts = self.policy.choose({s: _most_drafts(s) for s in decoding})
        self._drafting_seconds = 0.0
        if self._mtp is not None:
            self._run_modules(self._mtp, parts, work, hidden, num_drafts)
            return
        for sequence in decoding:
            if num_drafts[sequence] > 0:
                lookup = self._lookups.setdefault(sequence, PromptLookup())
                sequence.draft_tokens = lookup.propose(sequence.tokens, num_drafts[sequence])

    def _run_modules(
        self,
        mtp: MTPDrafter,
        parts: SequenceOf[ScheduledChunk],
        work: SequenceOf[ScheduledChunk],
        hidden: Tensor,
        num_drafts: Mapping[Sequence, int],
    ) -> None:
        taking_part = {item for item in parts if takes_part(item, num_drafts)}
        if not taking_part:
            return
        started = time.perf_counter()
        states = hidden.split([item.length for item in work])
        own = zip(work, states, strict=True)
        mtp.propose([(item, state) for item, state in own if item in taking_part], num_drafts)
        self._drafting_seconds = time.perf_counter() - started
        # The MTP modules also compute their entries of prompts, which is no cost of drafting.
        is_prefilling = any(item.length > 1 + MAX_DRAFT_TOKENS for item in taking_part)
        if not is_prefilling and (total := sum(num_drafts.values())):
            self.policy.drafted(total, self._drafting_seconds)

    def stepped(self, num_tokens: int, seconds: float) -> None:
        """Record the seconds of a step of decode chunks only, drafting included."""
        self.policy.stepped(num_tokens, seconds - self._drafting_seconds)


def _most_drafts(sequence: Sequence) -> int:
    """Draft tokens that can still become output: the step's own token takes one place."""
    return sequence.request.max_outputs - sequence.num_outputs - 1
