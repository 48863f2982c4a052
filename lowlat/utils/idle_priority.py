"""Idle scheduling priority (SCHED_IDLE) for background threads."""

import os
import sys
import threading
from contextlib import suppress

LOWEST_PRIORITY = 19
"""The nice value of threads where the system has no idle class."""


def lower_thread_priority() -> None:
    """Run the calling thread only on processors that nothing else uses, if the system allows it;
    else at the lowest priority. A low priority alone keeps its time slices: on a busy machine a
    thread of nice 15 still delays every step of the model.
    """
    if sys.platform != "linux":
        return
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except OSError:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
