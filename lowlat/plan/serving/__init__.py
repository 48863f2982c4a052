"""Cost model of serving: bytes, FLOPs and communication of a step, by parallel layout."""
