"""What a run reads: model configs, data, base model and teacher, checked before training."""
