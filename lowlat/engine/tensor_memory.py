"""The bytes of a CPU tensor as a memoryview, without a copy."""

from torch import Tensor


def as_memory(tensor: Tensor) -> memoryview:
    """A writable view of a contiguous uint8 tensor."""
    return memoryview(tensor.numpy())  # pyright: ignore[reportArgumentType]
