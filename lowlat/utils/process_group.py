"""Process group of a serving run under torchrun: start, messages between processes, agreement on
options, and the end of all processes when one fails.

Built on torch.distributed with gloo. A process that cannot reach another one ends (`heartbeat`).
"""

import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Never

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from lowlat.utils.errors import UserError
from lowlat.utils.heartbeat import GRACE_SECONDS, Heartbeat
from lowlat.utils.memory import share_memory

NO_TIMEOUT = timedelta(days=365)
"""Processes wait for the next step without a limit; heartbeats find those that are lost."""
SETTLING = 0.2
"""Seconds for gloo's threads to release their last tensors. A thread that frees a tensor while the
interpreter shuts down aborts the process.
"""
FIRST_INTEGERS = 512
"""Integers of the first message of a broadcast, which says how many follow in a second one."""
INTERFACE = "GLOO_SOCKET_IFNAME"

JOIN_SECONDS = 0.05
"""Time between attempts to find the others."""
_PREFIX = "lowlat/prefix"


@dataclass(slots=True)
class Traffic:
    """What this process has sent."""

    messages: int = 0
    bytes: int = 0

    def add(self, tensor: Tensor, receivers: int = 1) -> None:
        self.messages += receivers
        self.bytes += receivers * tensor.nbytes


def started_processes() -> int:
    """Processes that torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_follower() -> bool:
    """Whether this process is not process 0, which alone reads input and prints."""
    return started_processes() > 1 and int(os.environ.get("RANK", "0")) > 0


def is_launched() -> bool:
    """Whether torchrun has started this process."""
    return "WORLD_SIZE" in os.environ


def local_processes() -> int:
    """Processes of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


class ProcessGroup:
    """The processes of a run, or a part of them (`part`). Process 0 leads: it announces records,
    which the others receive.

    A failed message ends this process after its requests (`Heartbeat`); the call does not return.
    """

    def __init__(
        self,
        store: Store,
        ranks: range,
        rank: int,
        heartbeat: Heartbeat,
        members: dist.ProcessGroup | None = None,
    ) -> None:
        """ranks: the processes' ranks in the run. rank: this process's in the group. members: None
        for the whole run."""
        self.rank, self.world_size = rank, len(ranks)
        self.traffic = Traffic()
        self.heartbeat = heartbeat
        self._store, self._ranks, self._members = store, ranks, members

    @property
    def label(self) -> str:
        """This process's name in messages."""
        return f"process {self._ranks[self.rank]} of {dist.get_world_size()}"

    @property
    def has_left(self) -> bool:
        return self.heartbeat.has_ended

    def part(self, count: int) -> "ProcessGroup":
        """This process's part if the run is divided into `count` parts of consecutive processes.
        The parts share heartbeats: a lost process ends all. All processes call it at once."""
        if count == 1:
            return self
        size = self.world_size // count
        first = self.rank - self.rank % size
        ranks = self._ranks[first : first + size]
        members = self._new_group(ranks)
        return ProcessGroup(self._store, ranks, self.rank - first, self.heartbeat, members)

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    def fail(self, reason: str) -> Never:
        """End all processes: they are no longer in step."""
        self.heartbeat.lose(reason)
        while True:
            time.sleep(1.0)

    def announce(self, record: Int[Tensor, " length"]) -> None:
        """Send a record from process 0 to all others."""
        first = torch.zeros(FIRST_INTEGERS, dtype=torch.int64)
        first[0] = len(record)
        head = record[: FIRST_INTEGERS - 1]
        first[1 : 1 + len(head)] = head
        self._broadcast(first)
        if len(record) > len(head):
            self._broadcast(record[len(head) :].contiguous())

    def receive_record(self) -> Int[Tensor, " length"]:
        """The next record of process 0."""
        first = torch.empty(FIRST_INTEGERS, dtype=torch.int64)
        self._broadcast(first)
        length = int(first[0])
        head = first[1 : 1 + min(length, FIRST_INTEGERS - 1)]
        if length == len(head):
            return head
        rest = torch.empty(length - len(head), dtype=torch.int64)
        self._broadcast(rest)
        return torch.cat([head, rest])

    def send(self, tensor: Tensor, peer: int) -> "Sending":
        """Begin to send a tensor, which must not change before `Sending.wait`."""
        data = tensor.contiguous()
        if data.nbytes == 0:
            return Sending(self, None)
        self.traffic.add(data)
        with self.communicating():
            return Sending(self, dist.isend(_bytes_of(data), self._ranks[peer]))

    def receive(self, out: Tensor, peer: int) -> Tensor:
        """Fill `out`, which is contiguous, with the next tensor of `peer`."""
        if out.nbytes:
            with self.communicating():
                dist.recv(_bytes_of(out), self._ranks[peer])
        return out

    def gather_texts(self, text: str) -> list[str]:
        """The texts of all processes, in all of them."""
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        with self.communicating():
            dist.all_gather(sizes, torch.tensor([len(data)]), group=self._members)
            most = max(int(size) for size in sizes)
            padded = torch.nn.functional.pad(data, (0, most - len(data)))
            texts = [torch.empty_like(padded) for _ in range(self.world_size)]
            dist.all_gather(texts, padded, group=self._members)
        each = zip(texts, sizes, strict=True)
        return [bytes(text[: int(size)].tolist()).decode() for text, size in each]

    def subgroup(self, size: int) -> dist.ProcessGroup | None:
        """The `size` consecutive processes that this one is part of; None for one. They call it at
        once."""
        first = self.rank - self.rank % size
        return None if size == 1 else self._new_group(self._ranks[first : first + size])

    def _new_group(self, ranks: range) -> dist.ProcessGroup:
        with self.communicating():
            made = dist.new_group(
                list(ranks), timeout=NO_TIMEOUT, backend="gloo", use_local_synchronization=True
            )
        assert isinstance(made, dist.ProcessGroup)
        return made

    def all_gather(self, own: Tensor, out: Tensor, subgroup: dist.ProcessGroup | None) -> None:
        """Fill `out` with the tensors of all processes of `subgroup`; both are contiguous."""
        size = out.nbytes // own.nbytes
        self.traffic.add(own, size - 1)
        with self.communicating():
            dist.all_gather([*_bytes_of(out).chunk(size)], _bytes_of(own), group=subgroup)

    def barrier(self) -> None:
        """Wait until all processes have called it."""
        with self.communicating():
            dist.barrier(group=self._members)

    def least(self, value: int) -> int:
        """The smallest value among all processes."""
        tensor = torch.tensor(value)
        with self.communicating():
            dist.all_reduce(tensor, dist.ReduceOp.MIN, group=self._members)
        return int(tensor)

    def agree(self, facts: Mapping[str, str]) -> None:
        """Raise UserError, in all processes, unless their facts are equal."""
        each = [json.loads(text) for text in self.gather_texts(json.dumps(facts))]
        for rank, other in enumerate(each):
            for name, value in each[0].items():
                if other.get(name) != value:
                    raise UserError(
                        f"process {rank} of {self.world_size} differs from process 0 in its {name}:"
                        f" {other.get(name)}, not {value}; start all processes alike"
                    )

    def leave(self) -> None:
        """End as it should: the others are about to do so, too."""
        if self.has_left:
            return
        self.heartbeat.end()
        dist.destroy_process_group()
        time.sleep(SETTLING)

    def abandon(self, reason: str) -> None:
        """End the other processes, which may wait for messages; this one is about to end."""
        self.heartbeat.end()
        self.heartbeat.tell(reason)

    @contextmanager
    def reporting_once(self) -> Iterator[None]:
        """Within this context, an error that all processes raise is printed by one of them."""
        try:
            yield
        except UserError:
            self.leave()
            if self._is_first_report():
                raise
            time.sleep(GRACE_SECONDS)  # torchrun stops all processes when one ends
            raise SystemExit(2) from None

    def _is_first_report(self) -> bool:
        try:
            return self._store.add("lowlat/reports", 1) == 1
        except RuntimeError:  # the store has ended with its owner
            return False

    def _broadcast(self, tensor: Tensor) -> None:
        if self.is_leader:
            self.traffic.add(tensor, self.world_size - 1)
        with self.communicating():
            dist.broadcast(tensor, src=self._ranks[0], group=self._members)

    @contextmanager
    def communicating(self) -> Iterator[None]:
        """Within this context, an error of a message ends the process."""
        try:
            yield
        except RuntimeError as error:  # gloo has no type of its own; DistError is one, too
            self.fail(f"{self.label} lost another one ({_short(error)})")


@dataclass(frozen=True, slots=True)
class Sending:
    """A message on its way."""

    _group: ProcessGroup
    _work: dist.Work | None

    def wait(self) -> None:
        """Wait until the message has left."""
        if self._work is not None:
            with self._group.communicating():
                self._work.wait()


def join_group(processes: int, option: str) -> ProcessGroup:
    """The group of a run that `option` divides among this many processes. Raises UserError if these
    are fewer than two, or torchrun has started another number.
    """
    world = started_processes()
    if processes < 2:
        raise UserError(f"{option} is a layout of one process; leave --parallel out")
    if world != processes:
        raise UserError(
            f"{option} is for {processes} processes, {world} started; start it as: "
            f"torchrun --nproc-per-node {processes} -m lowlat ..."
        )
    _choose_interface(world)
    share_memory(local_processes())
    store, rank, world = next(rendezvous("env://"))
    store = PrefixStore(_common_prefix(store, rank, world), store)
    dist.init_process_group("gloo", timeout=NO_TIMEOUT, world_size=world, rank=rank, store=store)
    return ProcessGroup(store, range(world), rank, Heartbeat(store, rank, world))


@contextmanager
def quiet_followers() -> Iterator[None]:
    """Within this context, an error that all processes raise is printed by process 0 alone, after
    which torchrun ends the others."""
    try:
        yield
    except UserError:
        if is_follower():
            time.sleep(GRACE_SECONDS)
        raise


@contextmanager
def ignoring_signals() -> Iterator[None]:
    """Within this context, signals that torchrun passes to all processes are left to process 0,
    which lets running requests finish."""
    before = [(s, signal.signal(s, signal.SIG_IGN)) for s in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in before:
        signal.signal(number, handler)


def refuse_alone() -> Never:
    """Raise UserError: several processes were started for a program of one."""
    raise UserError(
        f"torchrun has started {started_processes()} processes, each of which would load the whole"
        " model; add --parallel, such as --parallel pipeline=2"
    )


def _common_prefix(store: Store, rank: int, world: int) -> str:
    """A new prefix of keys for the processes that join now. torchrun's store outlives restarts, and
    keys of ended processes would be taken for those of this run: their addresses, and that one was
    lost.
    """
    own = secrets.token_hex(8)
    if rank == 0:
        store.set(_PREFIX, own)
        for peer in range(1, world):
            greeting = store.get(f"{own}/hello/{peer}").decode()
            store.set(f"{own}/welcome/{greeting}", "")
        return own
    prefix = ""
    # The first prefix may be that of an ended process 0, which does not answer.
    while not prefix or not store.check([f"{prefix}/welcome/{own}"]):
        prefix = store.get(_PREFIX).decode()
        store.set(f"{prefix}/hello/{rank}", own)
        time.sleep(JOIN_SECONDS)
    return prefix


def _choose_interface(world: int) -> None:
    """Listen on the loopback interface, unless the run spans machines. Raises UserError if the
    interface between them is not configured.
    """
    if INTERFACE in os.environ:
        return
    if local_processes() < world:
        raise UserError(
            f"processes on several machines listen on one network interface; set {INTERFACE} to "
            "its name, such as eth1, on every machine"
        )
    os.environ[INTERFACE] = "lo0" if sys.platform == "darwin" else "lo"


def _bytes_of(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor, whatever its dtype."""
    return tensor.view(-1).view(torch.uint8)


def _short(error: Exception) -> str:
    return " ".join(f"{error}".split())[:200]
