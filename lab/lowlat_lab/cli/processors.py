"""Threads and priority of a study's process."""

import os
import sys
from pathlib import Path


def use_processors(threads: int | None, *, idle: bool) -> None:
    """Set the threads of this process (None: all), and its priority if it is `idle`."""
    from lowlat.ops.native import use_threads

    if threads is not None:
        use_threads(threads)
    if idle:
        os.nice(19)
    if idle and sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        # the scheduler first shares the processor between sessions; this is its own under setsid
        group = Path("/proc/self/autogroup")
        if os.getsid(0) == os.getpid() and group.exists():
            group.write_text("19")
