"""Digest of large files and tensors from samples, where reading them whole takes minutes."""

from collections.abc import Iterator

SAMPLES, SAMPLE_BYTES = 64, 4096


def sample_starts(size: int) -> Iterator[int]:
    """Where `SAMPLES` evenly spread samples of `SAMPLE_BYTES` begin, the last at the end of `size`
    bytes. Trained weights differ everywhere, so that samples tell them apart."""
    return ((size - SAMPLE_BYTES) * sample // (SAMPLES - 1) for sample in range(SAMPLES))
