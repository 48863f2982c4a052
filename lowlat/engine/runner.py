"""Runs the model over chunks of token ids: records in, logits out.

Owns the model, the paged cache and its pool of pages. Knows nothing of requests, sampling or text.
The cache starts small and at least doubles when its pages run out, so memory follows what is used.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lowlat.attention.cache import PAGE_SIZE, PagedCache
from lowlat.attention.cached import CachedAttention
from lowlat.attention.metadata import AttentionBatch, SequenceSlice
from lowlat.engine.pages import PagePool
from lowlat.engine.request import Chunk
from lowlat.model.native import NativeModel, has_native_form
from lowlat.model.transformer import Transformer

INITIAL_PAGES = 16


class Runner:
    """One model and one cache. Page lists are the callers', who `reserve` before they `run`.

    `cache_dtype` is that of the cache, torch.int8 included; None takes the activations'.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        page_size: int = PAGE_SIZE,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self._native = NativeModel(model) if has_native_form(model) else None
        self.pool = PagePool(INITIAL_PAGES)
        weight = model.embed_tokens.weight
        self.device = weight.device
        self.cache = PagedCache(
            model.config,
            num_pages=INITIAL_PAGES,
            page_size=page_size,
            dtype=cache_dtype or weight.dtype,
            device=self.device,
        )

    def reserve(self, pages: list[int], num_tokens: int) -> None:
        """Extend `pages` in place until they cover `num_tokens` rows."""
        missing = -(-num_tokens // self.cache.page_size) - len(pages)
        if missing > 0:
            self._make_room(missing)
            pages += self.pool.allocate(missing)

    def fork(self, pages: list[int], num_tokens: int) -> list[int]:
        """Pages of a second sequence that continues the same `num_tokens` rows.

        Full pages are shared, the partly filled last one is copied: both sequences go on writing
        into theirs.
        """
        num_full, rest = divmod(num_tokens, self.cache.page_size)
        shared = pages[:num_full]
        self.pool.retain(shared)
        if rest == 0:
            return shared
        self._make_room(1)
        (copy,) = self.pool.allocate(1)
        self.cache.copy_page(pages[num_full], copy)
        return [*shared, copy]

    def release(self, pages: list[int]) -> None:
        """Give `pages` back and empty the list."""
        self.pool.release(pages)
        pages.clear()

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> Float[Tensor, "rows vocab"]:
        """Cache the chunks' rows; return the logits they ask for, in order, at least fp32."""
        wanted: list[int] = []
        end = 0
        for chunk in chunks:
            end += len(chunk.tokens)
            wanted.extend(range(end - chunk.num_logits, end))
        if self._native is not None:
            return self._native_step(self._native, chunks, wanted)[1]
        hidden = self.hidden(chunks)
        if len(wanted) < end:
            hidden = hidden[torch.tensor(wanted, dtype=torch.int64, device=self.device)]
        return self.model.logits(hidden)

    @torch.inference_mode()
    def run_mtp(self, chunk: Chunk, ahead: Sequence[Sequence[int]]) -> list[Tensor]:
        """Cache one chunk's rows, MTP modules included; logits [tokens, vocab] of each MTP depth.

        ahead[k] holds, for the chunk's leading tokens, the token k + 1 places after each; depth k
        has as many rows. A depth has at most as many rows as the one before.
        """
        hidden = self.hidden([chunk])
        logits = []
        for depth, ids in enumerate(ahead):
            hidden = hidden[: len(ids)]
            if len(ids) > 0:
                batch = self._batch([(chunk.pages, chunk.start, len(ids))])
                hidden = self.model.mtp_hidden(
                    depth, hidden, self._ids(ids), batch.positions, self._attention(batch)
                )
            logits.append(self.model.mtp_logits(depth, hidden))
        return logits

    @torch.inference_mode()
    def hidden(self, chunks: Sequence[Chunk]) -> Float[Tensor, "tokens hidden"]:
        """Cache the chunks' rows; the final hidden state of every token."""
        if self._native is not None:
            return self._native_step(self._native, chunks, [])[0]
        batch = self._batch([(chunk.pages, chunk.start, len(chunk.tokens)) for chunk in chunks])
        ids = self._ids([token for chunk in chunks for token in chunk.tokens])
        return self.model(ids, batch.positions, self._attention(batch))

    def _native_step(
        self, native: NativeModel, chunks: Sequence[Chunk], wanted: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Hidden states of all tokens and logits of the wanted ones."""
        batch = self._batch([(chunk.pages, chunk.start, len(chunk.tokens)) for chunk in chunks])
        ids = self._ids([token for chunk in chunks for token in chunk.tokens])
        return native.step(ids, batch, self.cache, wanted)

    def check_integrity(self, holders: Sequence[Sequence[int]]) -> None:
        """Raise AssertionError unless pool, cache and the page lists of all sequences agree."""
        assert self.pool.num_pages == self.cache.num_pages
        self.pool.check_integrity(holders)

    def _make_room(self, num_pages: int) -> None:
        """Grow pool and cache until `num_pages` are free."""
        if num_pages <= self.pool.num_free:
            return
        total = max(2 * self.pool.num_pages, self.pool.num_used + num_pages)
        old = self.cache
        self.cache = PagedCache(
            self.model.config,
            num_pages=total,
            page_size=old.page_size,
            dtype=old.dtype,
            device=self.device,
        )
        self.cache.data[:, : old.num_pages] = old.data
        self.pool.grow(total)

    def _batch(self, slices: list[tuple[tuple[int, ...], int, int]]) -> AttentionBatch:
        sequences = [
            SequenceSlice(pages=pages, start=start, length=length)
            for pages, start, length in slices
        ]
        return AttentionBatch.build(sequences, page_size=self.cache.page_size, device=self.device)

    def _attention(self, batch: AttentionBatch) -> CachedAttention:
        return CachedAttention.for_config(self.model.config.attention, self.cache, batch)

    def _ids(self, ids: Sequence[int]) -> Int[Tensor, " tokens"]:
        return torch.tensor(ids, dtype=torch.int64, device=self.device)
