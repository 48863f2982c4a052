"""Recovery training (distillation) and evaluation of conversions to a smaller KV cache."""
