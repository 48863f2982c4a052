"""Prefill worker of disaggregated prefill: computes prompts for the decode process and sends it
their KV cache pages after each chunk.

It runs an engine of its own, with its own scheduler and prefix cache, in memory and on disk.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from lowlat.engine.engine import Engine
from lowlat.engine.kv_transfer import KVSender
from lowlat.engine.params import TokenSamplingParams
from lowlat.engine.prefill_planner import PrefillPlanner
from lowlat.engine.prefill_request import PrefillRequest, TransferKind
from lowlat.engine.prefix import IndexedPage, PageContent, PrefixCache
from lowlat.engine.request import LoRARequest, Request, RequestOptions
from lowlat.utils.errors import UserError

logger = logging.getLogger(__name__)

COPY_SECONDS = 0.02
"""Time between attempts to hand pages to a busy writer of the prefix cache on disk."""


@dataclass(slots=True, eq=False)
class PrefillJob:
    """A prompt in prefill."""

    number: int
    first: int
    """First page to send."""
    request: Request
    contents: list[PageContent]
    """All pages, from the first of the prompt to the last to send."""
    next: int = 0
    last: IndexedPage | None = None
    """The page before `next`."""


class PrefillWorker:
    """Serves the prefill requests of process 0. adapters: LoRA adapters that they may name."""

    def __init__(self, engine: Engine, sender: KVSender, adapters: Iterable[LoRARequest]) -> None:
        assert engine.prefix is not None, "pages are found by the prefix cache"
        self._engine = engine
        self._prefix: PrefixCache = engine.prefix
        self._sender = sender
        self._adapters = {adapter.lora_int_id: adapter for adapter in adapters}
        self._jobs: dict[int, PrefillJob] = {}

    def run(self) -> None:
        """Serve until process 0 ends."""
        while True:
            seconds: float | None = 0.0
            if not self._engine.has_work:
                seconds = COPY_SECONDS if self._engine.copy_pending() else None
            for request in self._sender.requests(seconds):
                match request.kind:
                    case TransferKind.PREFILL:
                        self._add(request)
                    case TransferKind.ABORT:
                        self._end(request.number)
                    case _:
                        self._engine.close()
                        return self._sender.end()
            self.save_kv_pages()
            self._engine.step()
            self.save_kv_pages()

    def save_kv_pages(self) -> None:
        """Send the pages that are full; ends the prompts that are complete or have failed."""
        for job in list(self._jobs.values()):
            if job.last is not None and self._prefix.indexed(job.last.page) is not job.last:
                # Evicted, with all that follow it: the preempted prompt is computed again.
                job.first, job.next, job.last = max(job.first, job.next), 0, None
            while job.next < len(job.contents):
                found = self._prefix.lookup(job.last, job.contents[job.next])
                if found is None:
                    break
                if job.next >= job.first:
                    self._sender.send(job.number, found.page, found.content)
                job.last, job.next = found, job.next + 1
            if job.next < len(job.contents):
                if all(each.finish_reason is None for each in job.request.sequences):
                    continue
                self._sender.fail(job.number)
            self._end(job.number)

    def _add(self, asked: PrefillRequest) -> None:
        options = RequestOptions(
            priority=asked.priority,
            cache_namespace=asked.cache_namespace,
            lora=self._adapters[asked.lora_int_id] if asked.lora_int_id else None,
        )
        try:
            # Not one token: MTP modules skip the last chunk of a sequence that ends with it.
            params = TokenSamplingParams(ignore_eos=True)
            request = self._engine.add(asked.prompt, params, options)
        except UserError as error:  # this group's KV cache may be smaller
            logger.warning("a prompt is computed by process 0: %s", error)
            self._sender.fail(asked.number)
            return
        planner: PrefillPlanner = self._engine.scheduler.planner
        paths = [planner.page_path(page, len(asked.prompt)) for page in range(asked.count)]
        contents = self._prefix.following([], options.prefix_namespace, asked.prompt, paths)
        self._jobs[asked.number] = PrefillJob(asked.number, asked.first, request, contents)

    def _end(self, number: int) -> None:
        """Stop a prompt, if it is not done."""
        job = self._jobs.pop(number, None)
        if job is not None:
            self._engine.abort(job.request.id)
