"""Training divided among processes: mesh, FSDP2, expert, tensor and context parallelism."""
