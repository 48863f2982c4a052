"""Fingerprint of a model's KV cache: SHA-256 of all that the bits of its entries depend on.

Weights by their content as loaded, config, KV cache dtype, rotary frequencies of the served
context, page size, prefill grid, kernels (code and instruction-set level) and versions.
"""

import hashlib
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from lowlat.engine.prefill_planner import PREFILL_CHUNK
from lowlat.engine.runner import ModelRunner
from lowlat.engine.tensor_memory import as_memory
from lowlat.model.linear import Linear
from lowlat.model.native import weight_bytes
from lowlat.model.transformer import Transformer
from lowlat.ops import native
from lowlat.utils.memory import is_larger_than_memory
from lowlat.utils.sampled_digest import SAMPLE_BYTES, SAMPLES, sample_starts

CODE = ("attention", "engine", "model", "ops")
"""Packages whose code decides the bits of an entry."""


def fingerprint_of(
    runner: ModelRunner, *, context: int, prefill_chunk: int = PREFILL_CHUNK
) -> bytes:
    """The fingerprint of the KV cache of `runner`, serving `context` tokens. Reads all weights
    once; of a model larger than memory, samples of each tensor, and the modification times of its
    files."""
    model = runner.model
    config = model.config
    ropes = {config.rope_of(layer).for_context(context) for layer in range(config.num_cache_layers)}
    facts = [
        version("lowlat"),
        code_digest(),
        torch.__version__,
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        f"native {native.level()}" if runner.is_batch_invariant else _torch_facts(),
        f"{runner.device.type} {runner.cache.dtype} {runner.cache.page_size} {prefill_chunk}",
        f"{model.embed_tokens.dtype} {config!r}",
        str(sorted(map(repr, ropes))),
        runner.weights_digest(weights_digest(model)),
    ]
    digest = hashlib.sha256()
    for fact in facts:
        data = fact.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def weights_digest(model: Transformer) -> str:
    """XXH3-128 of every tensor of a model, with names, shapes, dtypes and storage. If the model is
    larger than memory: of samples, with names, sizes and modification times of its files, as a
    rewritten file may differ between the samples."""
    named = [*model.named_parameters(), *model.named_buffers()]
    is_sampled = is_larger_than_memory(weight_bytes(model))
    with ThreadPoolExecutor(native.processors()) as pool:
        digests = list(pool.map(lambda item: _tensor_digest(item[1], is_sampled), named))
    whole = xxhash.xxh3_128()
    for (name, tensor), digest in zip(named, digests, strict=True):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode() + digest)
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            kinds = f"{module.storage} {module.block} {module.gguf_type} {module.keys_type}"
            interleaved = f"{module.is_interleaved} {module.keys_interleaved}"
            whole.update(f"{name} {kinds} {interleaved}".encode())
    if is_sampled:
        whole.update(repr(model.weight_files).encode())
    return whole.hexdigest()


def _tensor_digest(tensor: Tensor, is_sampled: bool) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest = xxhash.xxh3_128()
    if not is_sampled or len(flat) <= SAMPLES * SAMPLE_BYTES:
        digest.update(as_memory(flat))
        return digest.digest()
    for start in sample_starts(len(flat)):
        digest.update(as_memory(flat[start : start + SAMPLE_BYTES]))
    return digest.digest()


def _torch_facts() -> str:
    """Without native kernels, PyTorch's rounding depends on its threads."""
    return f"torch {torch.get_num_threads()}"


@cache
def code_digest() -> str:
    """SHA-256 of the code that computes entries: an installation may change without its version."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    files = [path for name in CODE for path in (package / name).rglob("*.py")]
    for path in sorted([*files, *package.glob("_native*")]):
        data = path.read_bytes()
        digest.update(f"{os.fspath(path.relative_to(package))} {len(data)}\n".encode() + data)
    return digest.hexdigest()
