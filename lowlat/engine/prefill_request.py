"""Requests of the decode process to prefill processes (disaggregated prefill), as integers."""

from dataclasses import dataclass
from enum import IntEnum


class TransferKind(IntEnum):
    """Kind of a message."""

    PREFILL = 0
    """Compute a prompt."""
    ABORT = 1
    """No more pages of a prompt are needed."""
    END = 2
    """The server ends; the prefill process answers with it."""
    PAGE = 3
    """A page follows."""
    FAILED = 4
    """A prompt's remaining pages cannot be computed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillRequest:
    """What the decode process asks of a prefill process."""

    kind: TransferKind
    number: int = 0
    """Number of the prompt in this run."""
    first: int = 0
    """First page to send."""
    count: int = 0
    """Pages up to and including the last to send, from the first of the prompt."""
    lora_int_id: int = 0
    priority: int = 0
    cache_namespace: bytes = b""
    prompt: tuple[int, ...] = ()

    def encode(self) -> list[int]:
        """As integers."""
        fields = [self.kind, self.number, self.first, self.count, self.lora_int_id, self.priority]
        lists = [len(self.cache_namespace), *self.cache_namespace, *self.prompt]
        return [*fields, *lists]

    @classmethod
    def decode(cls, record: list[int]) -> "PrefillRequest":
        """The request that `encode` gave."""
        kind, number, first, count, lora, priority, size, *rest = record
        return cls(
            kind=TransferKind(kind),
            number=number,
            first=first,
            count=count,
            lora_int_id=lora,
            priority=priority,
            cache_namespace=bytes(rest[:size]),
            prompt=tuple(rest[size:]),
        )
