"""Engine of a loaded model: its KV cache, and its part in a run of several processes."""

import logging
from typing import Literal, NamedTuple

from lowlat.config.attention import sparse_topk
from lowlat.engine.cache_size import new_runner
from lowlat.engine.disk_cache import DiskCacheOptions
from lowlat.engine.engine import Engine
from lowlat.engine.expert_balancer import ExpertBalancing
from lowlat.engine.kv_transfer import KVReceiver, KVSender
from lowlat.engine.prefill_worker import PrefillWorker
from lowlat.generate.lora import LoadedAdapters
from lowlat.model.transformer import Transformer
from lowlat.utils.process_group import ProcessGroup, ignoring_signals

logger = logging.getLogger(__name__)


class ServingGroup(NamedTuple):
    """The processes of a run that serves one model."""

    group: ProcessGroup
    prefill: int
    """Parts of the group, after the first, which compute prompts for it."""
    balancing: ExpertBalancing | None
    """Places the experts that the processes of a part divide."""


def new_engine(
    transformer: Transformer,
    context: int,
    *,
    name: str,
    eos_ids: frozenset[int],
    cache: str,
    max_cache_bytes: int | Literal["auto"] | None,
    disk: DiskCacheOptions | None,
    speculates: bool,
    adapters: LoadedAdapters,
    run: ServingGroup | None,
) -> Engine:
    """The engine, with the arguments of `Model`. Except in process 0 of `run`: serves process 0
    until it ends, and raises SystemExit.
    """
    group, prefill, balancing = run or (None, 0, None)
    part = None if group is None else group.part(1 + prefill)
    runner, limits = new_runner(
        transformer, cache, max_cache_bytes, context, adapters.selected, part, balancing
    )
    if sparse_topk(transformer.config.attention) is not None and not runner.is_batch_invariant:
        logger.warning(
            "%s: sparse attention runs in PyTorch, which is slow (see docs/sparse.md)", name
        )
    receiver = None
    if group is not None and group.is_leader and prefill > 0:
        receiver = KVReceiver(group, prefill, runner)
    engine = Engine(
        runner,
        context=context,
        eos_ids=eos_ids,
        limits=limits,
        disk=disk,
        receiver=receiver,
        speculates=speculates,
    )
    if group is not None and not group.is_leader:  # the first of a prefill group
        worker = PrefillWorker(engine, KVSender(group, runner), adapters.requests.values())
        with ignoring_signals():
            try:
                worker.run()
            except Exception as error:
                logger.exception("%s failed", group.label)
                group.fail(f"{group.label} failed: {type(error).__name__}")
        raise SystemExit(0)
    return engine
