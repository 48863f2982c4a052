"""Parallelism over a process mesh: FSDP2, expert, tensor and context parallelism of a model."""
