"""Loss of a process of a running server: what a streaming client sees and when, by fault.

    sudo python benchmarks/lost_process.py [MODEL] [--rounds 3] [--faults NAME ...] [--out FOLDER]

Two processes with one pipeline stage each serve MODEL (minnow). Once a response streams, one is
killed (SIGKILL), stopped (SIGSTOP), gets no more memory (RLIMIT_AS, or a control group, whose OOM
killer ends it) for a long prompt, or is cut off: that one runs in a network namespace of its own,
and its link goes down. The benchmark needs Linux and root. Times are in seconds since the fault
(the OOM killer's signal): until the client has an error, until /health answers 503 or not at all,
until all processes have ended. Exits with 1 if a client waits for more than 10 s.
"""

import argparse
import contextlib
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import results_file
from larger_than_memory import ControlGroup
from serving.process import tree
from serving.servers import Program, Server, free_port

LIMIT = 10.0
"""Seconds after which an error is late."""
PATIENCE = 120.0
NAMESPACE, OUTER, INNER = "lowlat-lost", "lowlat-lost0", "lowlat-lost1"
ADDRESSES = {OUTER: "10.213.7.1", INNER: "10.213.7.2"}
EVENTS_BEFORE = 20
"""Events of the response before the fault."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What happens to process `rank`."""

    rank: int
    number: signal.Signals | None = None
    memory: Literal["refused", "killed"] | None = None
    """An allocation fails, or the OOM killer ends the process. Without a signal, too: its network
    is cut."""

    @property
    def is_cut(self) -> bool:
        return self.number is None and self.memory is None


FAULTS = {
    "killed": Fault(rank=1, number=signal.SIGKILL),
    "stopped": Fault(rank=1, number=signal.SIGSTOP),
    "cut off": Fault(rank=1),
    "out of memory": Fault(rank=1, memory="refused"),
    "OOM killer": Fault(rank=1, memory="killed"),
    "process 0 killed": Fault(rank=0, number=signal.SIGKILL),
    "process 0 stopped": Fault(rank=0, number=signal.SIGSTOP),
    "process 0, OOM killer": Fault(rank=0, memory="killed"),
}
GROUP_BYTES = 2**20
"""What a process may add in the control group; the long prompt takes more."""
LONG_PROMPT = "The sea. " * 500


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="minnow")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    faults: list[str] = args.faults * args.rounds
    for number, name in enumerate(faults):
        with tempfile.TemporaryDirectory() as scratch:
            row = measure(args.model, FAULTS[name], Path(scratch))
        rows.append({"fault": name, "round": number // len(args.faults), **row})
        print(json.dumps(rows[-1]), flush=True)
    if args.out is not None:
        results_file.write(results_file.heading() | {"rows": rows}, args.out)
    if max(row["error_seconds"] for row in rows) > LIMIT:
        sys.exit(f"a client waited for more than {LIMIT:g} s")


def measure(model: str, fault: Fault, scratch: Path) -> dict[str, Any]:
    """What the client of one server sees."""
    with contextlib.ExitStack() as stack:
        server, processes = stack.enter_context(running(model, fault, scratch))
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json=endless(), timeout=PATIENCE
        ) as response:
            lines = (line for line in response.iter_lines() if line)
            for _ in itertools.islice(lines, EVENTS_BEFORE):
                pass
            stack.enter_context(applied(fault, processes[fault.rank], server.url))
            started = time.monotonic()
            health = Watched(lambda: is_unhealthy(server.url), started)
            seen = last_event(lines)
            error_seconds = time.monotonic() - started
        health.thread.join(PATIENCE)
        while any(is_alive(pid) for pid in processes.values()):
            if time.monotonic() - started > PATIENCE:
                raise RuntimeError("processes have not ended")
            time.sleep(0.05)
        return {
            "client": seen,
            "error_seconds": round(error_seconds, 2),
            "unhealthy_seconds": health.seconds,
            "ended_seconds": round(time.monotonic() - started, 2),
        }


def endless() -> dict[str, Any]:
    options = {"max_tokens": 1900, "ignore_eos": True, "stream": True}
    return {"model": "model", "prompt": "The sea", **options}


@contextlib.contextmanager
def applied(fault: Fault, pid: int, url: str) -> Iterator[None]:
    """The fault, until all processes have ended."""
    if fault.is_cut:
        ip("link", "set", OUTER, "down")
    elif fault.number is not None:
        os.kill(pid, fault.number)
    elif fault.memory == "refused":
        resource.prlimit(pid, resource.RLIMIT_AS, (1, resource.RLIM_INFINITY))
    group = ControlGroup(GROUP_BYTES) if fault.memory == "killed" else None
    if group is not None:
        group.processes.write_text(str(pid))
    if fault.memory is not None:
        body = {"model": "model", "prompt": LONG_PROMPT, "max_tokens": 1}
        threading.Thread(target=request, args=(f"{url}/v1/completions", body), daemon=True).start()
    while fault.memory == "killed" and is_alive(pid):
        time.sleep(0.005)
    yield
    if group is not None:
        group.remove()


def request(url: str, body: dict[str, Any]) -> None:
    """Send a request that fails."""
    with contextlib.suppress(httpx.HTTPError):
        httpx.post(url, json=body, timeout=PATIENCE)


def last_event(lines: Iterator[str]) -> str:
    """The error that ends the response."""
    try:
        *_, last = lines
    except httpx.TransportError as error:
        return f"connection ended ({type(error).__name__})"
    return json.loads(last.removeprefix("data:"))["error"]["message"]


class Watched:
    """Seconds from `started` until `condition` holds, polled by a thread."""

    def __init__(self, condition: Callable[[], bool], started: float) -> None:
        self.seconds: float | None = None
        self.thread = threading.Thread(target=self._watch, args=(condition, started), daemon=True)
        self.thread.start()

    def _watch(self, condition: Callable[[], bool], started: float) -> None:
        while not condition():
            time.sleep(0.05)
        self.seconds = round(time.monotonic() - started, 2)


def is_unhealthy(url: str) -> bool:
    """Whether /health answers 503, or nothing accepts connections."""
    try:
        return httpx.get(f"{url}/health", timeout=1.0).status_code == 503
    except httpx.TimeoutException:  # stopped: neither
        return False
    except httpx.TransportError:
        return True


@contextlib.contextmanager
def running(model: str, fault: Fault, scratch: Path) -> Iterator[tuple[Server, dict[int, int]]]:
    """A server that is ready, and its processes by rank."""
    serve = ["-m", "lowlat", "serve", model, "--parallel", "pipeline=2", "--threads", "1"]
    serve += ["--served-model-name", "model"]
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    with contextlib.ExitStack() as stack:
        if not fault.is_cut:
            command = [*launcher, "--standalone", "--nproc-per-node=2", *serve]
            settings: dict[str, str] = {}
            others: Sequence[int] = ()
        else:
            stack.enter_context(namespace())
            nodes = [
                *("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"),
                f"--rdzv-endpoint={ADDRESSES[OUTER]}:{free_port()}",
            ]
            command, settings = node(launcher, nodes, serve, 0, OUTER)
            inner, inner_settings = node(launcher, nodes, serve, 1, INNER)
            other = subprocess.Popen(
                ["ip", "netns", "exec", NAMESPACE, *inner],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ | inner_settings,
                start_new_session=True,
            )
            stack.callback(kill, other)
            others = (other.pid,)
        started = Program(name="server", command=command, settings=settings)
        server = stack.enter_context(Server(started, threads=1, folder=scratch))
        server.wait_ready()
        yield server, by_rank([server.pid, *others])


def node(
    launcher: list[str], nodes: list[str], serve: list[str], number: int, interface: str
) -> tuple[list[str], dict[str, str]]:
    """Command and environment of one machine."""
    own = [f"--node-rank={number}", f"--local-addr={ADDRESSES[interface]}"]
    own.append(f"--rdzv-conf=is_host={number == 0}")
    return [*launcher, *nodes, *own, *serve], {"GLOO_SOCKET_IFNAME": interface}


@contextlib.contextmanager
def namespace() -> Iterator[None]:
    """A network namespace with a link to this one."""
    ip("netns", "add", NAMESPACE)
    try:
        ip("link", "add", OUTER, "type", "veth", "peer", "name", INNER, "netns", NAMESPACE)
        ip("addr", "add", f"{ADDRESSES[OUTER]}/30", "dev", OUTER)
        ip("link", "set", OUTER, "up")
        for command in (
            ("addr", "add", f"{ADDRESSES[INNER]}/30", "dev", INNER),
            ("link", "set", INNER, "up"),
            ("link", "set", "lo", "up"),
        ):
            ip("-n", NAMESPACE, *command)
        yield
    finally:
        ip("link", "del", OUTER)
        ip("netns", "del", NAMESPACE)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def by_rank(launchers: Sequence[int]) -> dict[int, int]:
    """The processes that the launchers have started, by rank."""
    found = {}
    for pid in itertools.chain.from_iterable(map(tree, launchers)):
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        for entry in entries:
            if entry.startswith(b"RANK="):
                found.setdefault(int(entry[5:]), pid)
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs: not one whose parent has yet to ask for its status."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    main()
