"""Who runs in the next step: pure Python over request records, no tensors.

Owns the order of waiting and running sequences. Pages, tokens and states are the engine's.
"""

from collections import deque
from dataclasses import dataclass

from lowlat.engine.request import Sequence


@dataclass(frozen=True, slots=True)
class Work:
    """One sequence's share of a step: its next `length` pending tokens."""

    sequence: Sequence
    length: int


class Scheduler:
    """First come, first served: prompts are read first, then all running sequences decode together.

    A prompt is read in chunks of `prefill_chunk` tokens, whatever is read beside it, so that its
    rows come out the same in any company; a step reads at most `prefill_chunk` tokens of one or
    several prompts. At most `max_sequences` completions run at once; a request waits until all
    its n have room.
    """

    def __init__(self, *, prefill_chunk: int, max_sequences: int) -> None:
        assert prefill_chunk > 0 and max_sequences > 0
        self.prefill_chunk = prefill_chunk
        self.max_sequences = max_sequences
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue the first completion of a new request."""
        self.waiting.append(sequence)

    def fork(self, sequences: list[Sequence]) -> None:
        """Run the other completions of a request whose prompt is cached; their room was kept."""
        self.running += sequences

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that has finished, waiting or running."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def schedule(self) -> list[Work]:
        """The next step's work, empty when nothing is left. Moves sequences from waiting to
        running."""
        self._admit()
        prefilling = [sequence for sequence in self.running if sequence.is_prefilling]
        if not prefilling:
            return [Work(sequence, sequence.num_pending) for sequence in self.running]
        work: list[Work] = []
        budget = self.prefill_chunk
        for sequence in prefilling:
            length = min(sequence.num_pending, self.prefill_chunk)
            if length > budget:
                break
            work.append(Work(sequence, length))
            budget -= length
        return work

    def _admit(self) -> None:
        taken = sum(_room(sequence) for sequence in self.running)
        while self.waiting and taken + _room(self.waiting[0]) <= self.max_sequences:
            taken += _room(self.waiting[0])
            self.running.append(self.waiting.popleft())


def _room(sequence: Sequence) -> int:
    """Completions the sequence stands for: all n of its request until the prompt is cached."""
    return sequence.request.params.n if sequence.is_prefilling else 1
