"""Heartbeats of the processes of a run, through the store of torchrun's rendezvous: finds processes
that are dead, stopped (SIGSTOP) or cut off the network, whatever this process is waiting for.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import final

from torch.distributed.distributed_c10d import Store

BEAT_SECONDS = 0.5
"""Time between heartbeats."""
PEER_SECONDS = 6.0
"""A process without a heartbeat for this long is lost. Requests end with their error at most two
BEAT_SECONDS later, plus the time to end them."""
GRACE_SECONDS = 2.0
"""Time for responses to reach their clients before a process that has lost another one ends."""
EXIT_CODE = 1

_LOST = "lowlat/lost"
_LEADER = "lowlat/leader"


@final
class Heartbeat:
    """Two threads: one beats and reads the store, which may block; one watches its progress.

    Process 0 watches all others, which watch process 0. When one is lost, or `lose` is called, the
    process calls `on_lost` with the reason, waits GRACE_SECONDS, and ends with EXIT_CODE. On Linux,
    processes on its machine kill a silent process 0, whose clients would wait for it.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self._store = store.clone()  # pyright: ignore[reportAttributeAccessIssue]
        """A connection of its own: a blocked operation on the other one does not delay beats."""
        self._rank, self._world_size = rank, world_size
        self.on_lost: Callable[[str], None] = _report if rank == 0 else _ignore
        self._watched = range(1, world_size) if rank == 0 else range(1)
        self._beats = dict.fromkeys(self._watched, 0)
        self._seen = dict.fromkeys(self._watched, time.monotonic())
        self._store_seen = time.monotonic()
        self._reason: str | None = None
        self._leader = _leader_on_this_machine(store, rank)
        self._ended = threading.Event()
        for name, body in (("beat", self._beat), ("watch", self._watch)):
            threading.Thread(target=body, name=f"lowlat-{name}", daemon=True).start()

    def lose(self, reason: str) -> None:
        """End this process and the others, because they cannot continue together."""
        self._reason = self._reason or reason

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()

    def end(self) -> None:
        """Stop beating and watching, before the process ends as it should."""
        self._ended.set()

    def tell(self, reason: str) -> None:
        """Tell the other processes that this one is lost."""
        self._store.set(_LOST, reason)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                self._exchange()
            except RuntimeError:  # the store's owner is gone; DistError is one, too
                self.lose("the store of the run no longer answers")
                return

    def _exchange(self) -> None:
        self._store.add(_key(self._rank), 1)
        if self._reason is not None:
            self.tell(self._reason)
        elif self._store.check([_LOST]):
            self.lose(self._store.get(_LOST).decode())
        for peer in self._watched:
            beats = self._store.add(_key(peer), 0)
            if beats != self._beats[peer]:
                self._beats[peer], self._seen[peer] = beats, time.monotonic()
        self._store_seen = time.monotonic()

    def _watch(self) -> None:
        try:
            self._watch_peers()
        finally:
            if not self._ended.is_set():  # out of memory, and without a watch others would wait
                os._exit(EXIT_CODE)

    def _watch_peers(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            now = time.monotonic()
            if now - self._store_seen > PEER_SECONDS:
                self.lose("the store of the run no longer answers")
            else:
                # A silence counts while beats are read: this process may have been stopped itself.
                for peer, seen in self._seen.items():
                    if self._store_seen - seen > PEER_SECONDS:
                        self.lose(f"process {peer} of {self._world_size} no longer answers")
                        self._kill_leader()
            if self._reason is not None:
                self._abandon(self._reason)

    def _kill_leader(self) -> None:
        if self._leader is not None:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                signal.pidfd_send_signal(self._leader, signal.SIGKILL)

    def _abandon(self, reason: str) -> None:
        try:
            self.on_lost(reason)
        finally:
            time.sleep(GRACE_SECONDS)
            sys.stderr.flush()
            # Threads that wait for a lost process cannot be interrupted.
            os._exit(EXIT_CODE)


def _leader_on_this_machine(store: Store, rank: int) -> int | None:
    """A file descriptor of process 0, if this is another process of its machine."""
    if rank == 0:
        store.set(_LEADER, str(os.getpid()))
        return None
    # torchrun numbers processes machine by machine
    if os.environ.get("LOCAL_RANK") != str(rank) or not hasattr(os, "pidfd_open"):
        return None
    return os.pidfd_open(int(store.get(_LEADER)))


def _key(rank: int) -> str:
    return f"lowlat/beat/{rank}"


def _report(reason: str) -> None:
    print(f"lowlat: error: {reason}; start all processes again", file=sys.stderr, flush=True)


def _ignore(reason: str) -> None:
    pass
