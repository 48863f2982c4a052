"""Attention backends: paged KV cache for inference, packed flash attention for training."""
