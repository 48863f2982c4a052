"""Training checkpoints: the run folder and its lock, atomic writes, retention, checked reads."""
