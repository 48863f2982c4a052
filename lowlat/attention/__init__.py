"""Attention backends: paged KV cache for inference, packed and flash attention for training."""
