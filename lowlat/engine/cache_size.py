"""KV cache size: from a bound in bytes, or from free memory, to a number of pages
(num_blocks in vLLM).

Owns the arithmetic, and the share of the free memory that "auto" takes.
"""

from typing import Literal

import torch

from lowlat.attention.cache import PAGE_SIZE
from lowlat.attention.int8_entry import entry_bytes
from lowlat.engine.expert_balancer import ExpertBalancing
from lowlat.engine.parallel_runner import ParallelRunner
from lowlat.engine.params import integer_of
from lowlat.engine.runner import ModelRunner
from lowlat.engine.scheduler import MAX_SEQUENCES, Limits
from lowlat.model.lora import SelectedAdapter
from lowlat.model.native import weight_bytes
from lowlat.model.transformer import Transformer
from lowlat.utils.device import parse_cache
from lowlat.utils.errors import UserError
from lowlat.utils.memory import RESERVE, memory_limit
from lowlat.utils.process_group import ProcessGroup

CACHE_SHARE = 0.8
"""Share of the free memory that a cache of size "auto" may grow to (vLLM: gpu_memory_utilization,
there a share of all memory)."""


def new_runner(
    transformer: Transformer,
    cache: str,
    max_cache_bytes: int | Literal["auto"] | None,
    context: int,
    selected_adapter: SelectedAdapter | None = None,
    group: ProcessGroup | None = None,
    balancing: ExpertBalancing | None = None,
) -> tuple[ModelRunner, Limits]:
    """A runner whose KV cache stays within `max_cache_bytes`, and the scheduler's limits. `cache`
    is the dtype of its entries (kv_cache_dtype in vLLM), `selected_adapter` that of `add_adapters`.
    The bytes are those of one process of `group`; all processes have as many pages. Returns in
    process 0 of it only (`follow_leader`). `balancing` places experts while serving. Raises
    UserError if the bytes are less than a page or more than the device's memory.
    """
    dtype = parse_cache(cache)

    def make(**pages: int) -> ModelRunner:
        options = {"cache_dtype": dtype, "selected_adapter": selected_adapter, **pages}
        if group is not None and group.world_size > 1:
            runner = ParallelRunner(transformer, group, balancing, **options)
            runner.follow_leader()
            return runner
        return ModelRunner(transformer, **options)

    if max_cache_bytes is None:
        return make(), Limits()
    stored = dtype or transformer.embed_tokens.dtype
    own = transformer.cached_attentions()
    page = PAGE_SIZE * sum(entry_bytes(each, stored) for each in own if each is not None)
    limit = check_cache_limit(max_cache_bytes, transformer.embed_tokens.weight.device)
    if limit is None:
        limit = max(page, _spare_memory(transformer))
    # All sequences together fill no more pages than this.
    most = MAX_SEQUENCES * (-(-context // PAGE_SIZE))
    num_pages = min(most, limit // page)
    if group is not None:
        num_pages = group.least(num_pages)
    if num_pages < 1:
        raise UserError(
            f"max_cache_bytes {limit} is less than a page of the cache ({page} bytes, "
            f"{PAGE_SIZE} tokens); raise it"
        )
    runner = make(num_pages=num_pages, max_pages=num_pages)
    return runner, Limits(max_pages=num_pages)


def check_cache_limit(limit: int | Literal["auto"] | None, device: torch.device) -> int | None:
    """`limit` as a number of bytes; None for "auto" and None. Raises UserError for other values and
    for more than the device's memory."""
    if limit is None or limit == "auto":
        return None
    size = integer_of(limit)
    if size is None:
        raise UserError(
            f"max_cache_bytes must be an integer of bytes, 'auto' or None, got {limit!r}"
        )
    check_cache_bytes(size, device, f"max_cache_bytes {size}")
    return size


def check_cache_bytes(size: int, device: torch.device, given: str) -> None:
    """Raises UserError, beginning with `given`, if `size` exceeds the device's memory in bytes: an
    error at the start instead of out of memory later."""
    there = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else memory_limit()
    if size > there:
        raise UserError(f"{given}: exceeds the {there / 2**30:.1f} GiB of memory; give less")


def _spare_memory(transformer: Transformer) -> int:
    """Bytes for the cache: CACHE_SHARE of the memory left after the weights, or of a tenth of all
    memory if that is more."""
    device = transformer.embed_tokens.weight.device
    if device.type == "cuda":
        return int(CACHE_SHARE * torch.cuda.mem_get_info(device)[0])
    limit = memory_limit()
    free = limit - RESERVE - weight_bytes(transformer)
    return int(CACHE_SHARE * max(free, limit // 10))
