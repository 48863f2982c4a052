"""Starts programs as several processes of one run on this machine, as torchrun would."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence

from tests import forked

TIMEOUT = 900


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(count: int, arguments: Sequence[str]) -> list[subprocess.Popen[str]]:
    """`count` processes of `python *arguments`, which know of one another."""
    port = free_port()
    processes = []
    for rank in range(count):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONWARNINGS": "error",
        }
        processes.append(
            forked.Popen(
                [sys.executable, *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def finish(
    processes: Sequence[subprocess.Popen[str]], timeout: float = TIMEOUT
) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each."""
    results = []
    try:
        for process in processes:
            output, errors = process.communicate(timeout=timeout)
            results.append((process.returncode, output, errors))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return results


def run(count: int, arguments: Sequence[str], timeout: float = TIMEOUT) -> None:
    """Run to the end; every process must succeed."""
    for rank, (code, output, errors) in enumerate(finish(start(count, arguments), timeout)):
        assert code == 0, f"process {rank} ended with {code}:\n{output}{errors[-4000:]}"
