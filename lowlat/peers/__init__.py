"""Adapters of peer programs (transformers, llama.cpp, vLLM, DeepSeek's model.py).

Each adapter loads a model in its peer, returns logits and runs timed steps. A peer runs in a worker
process under the interpreter that has it: `worker` is the host's side, `protocol` the worker's.
"""
