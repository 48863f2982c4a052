"""lowlat with a delay before every message between its processes, which emulates the latency of a
network where the kernel has no netem.

    torchrun ... benchmarks/delayed_messages.py MICROSECONDS ARGUMENT...
"""

import sys
import time
from collections.abc import Callable
from typing import Any

from lowlat.cli.main import run
from lowlat.utils.process_group import ProcessGroup

SENDING = ("all_gather", "announce", "send")


def delayed(method: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        time.sleep(seconds)
        return method(*arguments)

    return call


if __name__ == "__main__":
    delay = 1e-6 * float(sys.argv.pop(1))
    for name in SENDING:
        setattr(ProcessGroup, name, delayed(getattr(ProcessGroup, name), delay))
    run()
