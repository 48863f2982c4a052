"""Adapters of peer programs (transformers, llama.cpp, vLLM, DeepSeek's model.py).

Each adapter loads a model in its peer, returns logits and runs timed steps. A peer runs in a worker
process under its own Python interpreter: `worker` is the host side, `protocol` the worker side.
"""
