"""LLM engine over token ids: continuous batching, paged KV cache, sampling, speculation."""
