"""Background writer of the prefix cache on disk: one thread of idle priority, bounded buffers.

The engine's thread copies a page into a free buffer and queues it; the writer computes the
checksum, keeps the limit and writes the file. A page that finds no free buffer waits in memory, so
a slow disk delays no step. No failure ends the thread or the server.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue

import torch
from torch import Tensor

from lowlat.engine.disk_budget import DiskBudget
from lowlat.engine.page_folder import PageFolder, touch
from lowlat.engine.prefix import PageContent
from lowlat.engine.stats import DiskCacheRecorder
from lowlat.engine.tensor_memory import as_memory
from lowlat.utils.disk_errors import NO_SPACE, reason_and_remedy
from lowlat.utils.idle_priority import lower_thread_priority

logger = logging.getLogger(__name__)

BUFFER_BYTES = 64 * 2**20
"""Memory for pages on their way to the disk."""
MIN_BUFFERS = 2
PAUSE_SECONDS = 10.0
"""After a failed write (a full disk), pages are dropped for this long."""
CLOSE_SECONDS = 30.0
"""Most seconds that `close` waits for queued pages."""

Job = Callable[[], None]


class PageWriter:
    """Writes, touches and removes page files in the order of the calls. Every method but `close`
    and `run_one` is the engine's thread's."""

    def __init__(self, folder: PageFolder, budget: DiskBudget, recorder: DiskCacheRecorder) -> None:
        self._folder = folder
        self._budget = budget
        self._recorder = recorder
        self._jobs: deque[Job] = deque()
        self._wake: SimpleQueue[bool] = SimpleQueue()
        """An item per job; False ends the thread."""
        self._running = threading.Lock()
        """Held while a job runs: jobs run in order, whichever thread runs them."""
        self._paused_until = 0.0
        self.page_seconds = 0.0
        """Processor time of the last page that was written."""
        count = max(MIN_BUFFERS, BUFFER_BYTES // folder.format.file_bytes)
        self._num_unmade = count
        self._free: deque[Tensor] = deque()
        self._queue(self._count)
        self._thread = threading.Thread(target=self._run, name="lowlat-pages", daemon=True)
        self._thread.start()

    def take_buffer(self) -> Tensor | None:
        """A free buffer of file_bytes; None if all are in use."""
        try:
            return self._free.popleft()
        except IndexError:
            if self._num_unmade == 0:
                return None
            self._num_unmade -= 1
            return torch.empty(self._folder.format.file_bytes, dtype=torch.uint8)

    def give_back(self, buffer: Tensor) -> None:
        """Return a buffer unused."""
        self._free.append(buffer)

    def write(self, content: PageContent, buffer: Tensor, used_at: float) -> None:
        """Queue a page, whose payload is in `buffer`, from take_buffer."""
        self._queue(lambda: self._write(content, buffer, used_at))

    def touch(self, contents: list[PageContent], used_at: float) -> None:
        """Queue a new time of last use for the files of a sequence, its pages in order."""
        self._queue(lambda: self._touch(contents, used_at))

    def remove(self, contents: list[PageContent]) -> None:
        """Queue the removal of files."""
        self._queue(lambda: self._remove(contents))

    def run_one(self) -> bool:
        """Run the next job in the calling thread; False if there is none."""
        with self._running:
            if not self._jobs:
                return False
            self._run_job(self._jobs[0])
            self._jobs.popleft()
            return True

    def flush(self, seconds: float) -> bool:
        """Run the queued jobs, in the calling thread too, which may have the higher priority.
        Whether all are done."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not self.run_one():
                return True
        return False

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Finish the queued jobs and end the thread."""
        if threading.current_thread() is self._thread:
            # Garbage collection in a job: the thread runs the queued jobs after this one.
            self._wake.put(False)
            return
        self.flush(seconds)
        self._wake.put(False)
        # A thread that outlives the interpreter is killed wherever it is.
        self._thread.join(seconds)

    def _queue(self, job: Job) -> None:
        self._jobs.append(job)
        self._wake.put(True)

    def _run(self) -> None:
        lower_thread_priority()
        while self._wake.get():
            self.run_one()

    def _run_job(self, job: Job) -> None:
        try:
            job()
        except OSError as error:
            self._fail(error)
        except Exception:
            logger.exception("a page of the prefix cache could not be stored")
            self._recorder.dropped("write_error")

    def _fail(self, error: OSError) -> None:
        """Record a failed write, and pause."""
        is_full = error.errno in NO_SPACE
        self._recorder.dropped("disk_full" if is_full else "write_error")
        self._paused_until = time.monotonic() + PAUSE_SECONDS
        logger.warning(
            "the prefix cache is not written to disk for %d s: %s",
            PAUSE_SECONDS,
            reason_and_remedy(error, self._folder.folder),
        )

    # --- jobs ----------------------------------------------------------------------------------

    def _count(self) -> None:
        self._recorder.evicted(self._budget.count())

    def _write(self, content: PageContent, buffer: Tensor, used_at: float) -> None:
        try:
            if time.monotonic() < self._paused_until:
                self._recorder.dropped("disk_full")
                return
            if self._folder.has(content):
                touch(self._folder.path(content), used_at)
                return
            size = self._folder.format.file_bytes
            started = time.thread_time()
            self._recorder.evicted(self._budget.reserve(size))
            try:
                self._folder.write(content, as_memory(buffer), used_at)
            except BaseException:
                self._budget.give_back(size)
                raise
            self._recorder.wrote(size)
            self.page_seconds = time.thread_time() - started
        finally:
            self._free.append(buffer)

    def _touch(self, contents: list[PageContent], used_at: float) -> None:
        # Later pages count as used earlier: a page is of no use without the pages before it.
        for content in contents:
            with suppress(FileNotFoundError):
                touch(self._folder.path(content), used_at - 1e-6 * content.depth)

    def _remove(self, contents: list[PageContent]) -> None:
        for content in contents:
            if self._folder.remove(content):
                self._budget.give_back(self._folder.format.file_bytes)
