"""Benchmark worker of lowlat: runs the engine's model runner; `peers.protocol` times it."""

from collections.abc import Sequence
from typing import Any

import torch

from lowlat import api
from lowlat.attention.path import choose_path
from lowlat.bench.benchmark_plan import STORED
from lowlat.engine.prefill_planner import PREFILL_CHUNK
from lowlat.engine.request import Chunk
from lowlat.engine.runner import ModelRunner
from lowlat.ops import native
from lowlat.peers.protocol import TimedModel, random_token_ids, serve_requests, timed_handlers

SPARE_TOKENS = 64
"""KV cache capacity beyond the measured context, for the decode steps."""
COMPUTED_ENTRIES = 1024
"""KV cache entries that are computed to fill a cache; the others are copies."""


class Lowlat(TimedModel):
    """One sequence with fixed KV cache pages, so that their order is the same in all rounds."""

    def load(
        self,
        *,
        model: str,
        precision: str,
        cache: str,
        threads: int,
        context: int,
        parallel: str | None = None,
    ) -> dict[str, Any]:
        """See TimedModel. parallel: as in `lowlat.load`."""
        native.use_threads(threads)
        # a plain cache has the dtype of the computation
        options: dict[str, Any] = {"cache": cache} if cache == "int8" else {}
        # fp8 blocks and GGUF blocks are a property of the checkpoint
        dtype = "auto" if precision in ("fp8", STORED) else precision
        loaded = api.load(model, dtype=dtype, parallel=parallel, **options)
        self.use(loaded.runner)
        return {"cache_bytes_per_token": loaded.cache_bytes_per_token}

    def use(self, runner: ModelRunner) -> None:
        """Time the model of `runner`, with an empty cache."""
        self.runner = runner
        self.vocab_size = runner.model.config.vocab_size
        self.pages: list[int] = []
        self.filled = 0

    def prefill(self, ids: Sequence[int]) -> Any:
        return self.prefill_after(ids, 0)

    def prefill_after(self, ids: Sequence[int], cached: int) -> Any:
        """Chunked prefill of `ids` after `cached` entries; logits [vocab] of the last token."""
        logits = None
        for start in range(0, len(ids), PREFILL_CHUNK):
            part = ids[start : start + PREFILL_CHUNK]
            is_last = start + len(part) == len(ids)
            logits = self._run(part, cached + start, num_logits=1 if is_last else 0)
        assert logits is not None
        return logits[0].numpy()

    def fill_cache(self, context: int) -> None:
        if self.filled < min(context, COMPUTED_ENTRIES):
            self.prefill(random_token_ids(min(context, COMPUTED_ENTRIES), self.vocab_size))
        self.runner.reserve(self.pages, context + SPARE_TOKENS)
        if context <= self.filled:
            return
        size = self.runner.cache.page_size
        for number in range(self.filled // size, -(-context // size)):
            source = self.pages[number % (COMPUTED_ENTRIES // size)]
            self.runner.copy_page(source, self.pages[number])
        self.filled = context

    def decode_step(self, token: int, position: int) -> Any:
        return self._run([token], position, num_logits=1)[0].numpy()

    def logits(self, ids: Sequence[int]) -> Any:
        return self._run(ids, 0, num_logits=len(ids)).numpy()

    def _run(self, ids: Sequence[int], start: int, *, num_logits: int) -> torch.Tensor:
        end = start + len(ids)
        self.runner.reserve(self.pages, end)
        self.filled = max(self.filled, end)
        form = choose_path(self.runner.model.config.attention, len(ids))
        chunk = Chunk(
            tokens=ids, start=start, pages=tuple(self.pages), num_logits=num_logits, path=form
        )
        return self.runner.run([chunk])


if __name__ == "__main__":
    serve_requests(timed_handlers(Lowlat()))
