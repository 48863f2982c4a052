"""Prefix cache on disk, engine side: which pages are written, and reading them back.

Full pages of the prefix cache are copied to buffers after a step and written by the background
thread of `page_writer`; `prefix_loader` reads pages of waiting requests. Only the engine's thread
calls it, except `close`.
"""

import os
import time
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lowlat.engine.disk_budget import DiskBudget, on_disk
from lowlat.engine.page_folder import PageFolder, PageFormat, ReadResult, open_folder
from lowlat.engine.page_writer import CLOSE_SECONDS, PageWriter
from lowlat.engine.params import integer_of
from lowlat.engine.prefix import IndexedPage, PageContent, PrefixCache
from lowlat.engine.runner import ModelRunner
from lowlat.engine.stats import DiskCacheRecorder
from lowlat.engine.tensor_memory import as_memory
from lowlat.utils.errors import UserError

DEFAULT_DISK_BYTES = 10 * 2**30
WRITE_SHARE = 0.02
"""Share of the steps' time that copying pages to the writer's buffers and writing them may take."""
MAX_CREDIT_SECONDS = 0.05
TOUCH_SECONDS = 60.0
"""A page's time of last use on disk is at most this much too old."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskCacheOptions:
    """Where a prefix cache lies on disk, and how large it may grow."""

    folder: Path
    max_bytes: int = DEFAULT_DISK_BYTES
    """Bytes of all models and servers that share the folder."""


def disk_cache_options(
    folder: str | os.PathLike[str] | None, max_bytes: int
) -> DiskCacheOptions | None:
    """Options of a cache in `folder`, None without one. Raises UserError for a limit that is not a
    number of bytes."""
    if folder is None:
        return None
    size = integer_of(max_bytes)
    if size is None or size <= 0:
        raise UserError(f"prefix_cache_disk_bytes must be a number of bytes, got {max_bytes!r}")
    return DiskCacheOptions(folder=Path(folder), max_bytes=size)


class DiskCache:
    """The page files of one model. `prefix` indexes its pages in memory."""

    def __init__(
        self,
        options: DiskCacheOptions,
        *,
        fingerprint: bytes,
        runner: ModelRunner,
        prefix: PrefixCache,
    ) -> None:
        page_format = PageFormat(
            fingerprint=fingerprint,
            page_size=runner.cache.page_size,
            payload_bytes=runner.page_bytes,
        )
        size = on_disk(page_format.file_bytes)
        if options.max_bytes < 2 * size:
            raise UserError(
                f"the limit of the prefix cache on disk, {options.max_bytes} bytes, is less than "
                f"two pages of the cache ({2 * size} bytes); raise it"
            )
        open_folder(options.folder)
        self._runner = runner
        self._prefix = prefix
        self.recorder = DiskCacheRecorder()
        self._folder = PageFolder(options.folder, page_format)
        budget = DiskBudget(options.folder, options.max_bytes)
        self._writer = PageWriter(self._folder, budget, self.recorder)
        self._pending: OrderedDict[bytes, tuple[IndexedPage, float]] = OrderedDict()
        """Pages to be written, by key, with their times of last use."""
        self._credit = 0.0
        """Seconds that pages may take now."""
        self._touched: dict[bytes, float] = {}
        """Times of last use of sequences, by the key of their last page."""
        self._buffer = torch.empty(page_format.file_bytes, dtype=torch.uint8)
        self._view = as_memory(self._buffer)
        # Also at the end of the interpreter.
        self._finalizer = weakref.finalize(self, self._writer.close)

    # --- writing -------------------------------------------------------------------------------

    def offer(self, pages: Sequence[int]) -> None:
        """Have indexed pages written, those that are not on disk yet."""
        now = time.time()
        for page in pages:
            indexed = self._prefix.indexed(page)
            if indexed is not None and not indexed.is_on_disk:
                indexed.is_on_disk = True
                self._pending[indexed.key] = indexed, now - 1e-6 * indexed.depth

    def touch(self, pages: Sequence[int]) -> None:
        """Record a use of a sequence's leading pages, so that they are evicted last (LRU)."""
        found = [self._prefix.indexed(page) for page in pages]
        indexed = [page for page in found if page is not None]
        now = time.time()
        if not indexed or now - self._touched.get(indexed[-1].key, 0.0) < TOUCH_SECONDS:
            return
        if len(self._touched) > 10_000:
            self._touched.clear()
        self._touched[indexed[-1].key] = now
        for each in indexed:
            if each.key in self._pending:
                self._pending[each.key] = each, now - 1e-6 * each.depth
        self._writer.touch([each.content for each in indexed], now)

    def withdraw(self, contents: list[PageContent]) -> None:
        """Remove pages that hold bad values."""
        for content in contents:
            self._pending.pop(content.key, None)
        self._writer.remove(contents)

    def copy_after_step(self, step_seconds: float) -> None:
        """Copy pages to free buffers and queue them for the writer, as far as WRITE_SHARE of the
        steps' time allows."""
        if not self._pending:
            self._credit = 0.0
            return
        self._credit = min(self._credit + WRITE_SHARE * step_seconds, MAX_CREDIT_SECONDS)
        while self._credit > 0.0:
            started = time.perf_counter()
            if not self._copy_one():
                return
            self._credit -= time.perf_counter() - started + self._writer.page_seconds

    def copy_pending(self) -> bool:
        """Copy pages to free buffers and queue them for the writer; whether some are left."""
        while self._copy_one():
            pass
        return bool(self._pending)

    def _copy_one(self) -> bool:
        """Copy the next page; False if there is none, or no free buffer."""
        if not self._pending:
            return False
        buffer = self._writer.take_buffer()
        if buffer is None:
            return False
        indexed, used_at = self._pending.popitem(last=False)[1]
        if self._prefix.indexed(indexed.page) is not indexed:
            # Evicted from memory before a buffer was free.
            self.recorder.dropped("late")
            self._writer.give_back(buffer)
        else:
            self._runner.export_page(indexed.page, buffer[self._folder.format.payload_start :])
            self._writer.write(indexed.content, buffer, used_at)
        return True

    def copy_all(self) -> None:
        """Copy all pages that wait, writing in the calling thread too while no buffer is free."""
        while self.copy_pending():
            self._writer.run_one()

    def flush(self, seconds: float = CLOSE_SECONDS) -> bool:
        """Write everything; whether that took less than `seconds`."""
        self.copy_all()
        return self._writer.flush(seconds)

    def close(self) -> None:
        """Write everything and end the writer. The object cannot be used afterwards."""
        if self._finalizer.alive:
            self.copy_all()
            self._finalizer()

    # --- reading -------------------------------------------------------------------------------

    def has(self, content: PageContent) -> bool:
        return self._folder.has(content)

    def prefetch(self, content: PageContent) -> None:
        self._folder.prefetch(content)

    def read(self, content: PageContent, *, may_wait: bool) -> ReadResult:
        """Read and verify a page, for `fill`. The system reads a pending one ahead; a damaged file
        is removed."""
        result = self._folder.read(content, self._view, may_wait=may_wait)
        if result == "pending":
            self.prefetch(content)
        elif result not in ("read", "missing"):
            self.recorder.dropped(result)
            self._writer.remove([content])
        return result

    def fill(self, page: int) -> None:
        """Fill a page of the KV cache with what `read` has read."""
        self._runner.import_page(page, self._buffer[self._folder.format.payload_start :])
        self.recorder.read(len(self._buffer), self._folder.format.page_size)
