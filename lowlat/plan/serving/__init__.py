"""What serving a model costs: bytes, FLOPs and communication of a step, by parallel layout."""
