"""Fork server that scores samples: a fork for each sample and reward function, with limits on its
time and memory.

`rewards.workers` starts it with few environment variables, no inherited file but its channel, and
no output streams. It loads the reward functions once. A fork leaves no trace in the process, so a
score depends on its sample alone, and a function that hangs, crashes or exits ends its fork only.
"""

import ctypes
import gc
import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn, SupportsFloat

from lowlat.train.rewards.functions import REWARDS, Reward
from lowlat.train.rewards.reward_file import is_file, load_reward_file
from lowlat.train.rewards.sample import FunctionName, RewardContext, Sample
from lowlat.utils.errors import UserError

PR_SET_PDEATHSIG = 1
LONGEST_DETAIL = 300
"""Characters of an error's text, so that an answer fits a pipe's atomic write."""
SHOWN_VALUE = 60
LONGEST_TEXT = 1 << 16
"""Characters of a tool message."""

Answer = tuple[str | None, float | str | None]
"""(None, score or text of a tool), or (kind of the failure, detail)."""


@dataclass(slots=True)
class Scoring:
    """A fork that runs."""

    task: int
    pid: int
    pipe: Connection
    deadline: float


class _OverdueError(BaseException):
    """The time limit of `prepare`, which its handlers of Exception must not catch."""


def _stop_prepare(number: int, frame: object) -> NoReturn:
    raise _OverdueError


class ForkServer:
    """Starts a fork per request and sends its answer, or why there is none, over `channel`."""

    def __init__(
        self,
        channel: Connection,
        rewards: Sequence[Reward],
        *,
        seconds: float,
        memory_bytes: int,
    ) -> None:
        self._channel = channel
        self._rewards = rewards
        self._seconds, self._memory_bytes = seconds, memory_bytes
        self._running: dict[Connection, Scoring] = {}

    def serve(self) -> None:
        """Answer requests until the channel closes."""
        while True:
            left = [scoring.deadline - time.monotonic() for scoring in self._running.values()]
            ready = wait([self._channel, *self._running], max(0.0, min(left)) if left else None)
            if self._channel in ready and not self._accept():
                break
            for pipe in [pipe for pipe in self._running if pipe in ready]:
                self._finish(self._running.pop(pipe))
            now = time.monotonic()
            for scoring in [job for job in self._running.values() if job.deadline <= now]:
                # It may have answered while the next request was prepared.
                is_overdue = not scoring.pipe.poll()
                self._finish(self._running.pop(scoring.pipe), is_overdue=is_overdue)
        for scoring in self._running.values():
            _end(scoring)

    def _accept(self) -> bool:
        """Start the next request; False once the channel is closed."""
        try:
            request = json.loads(self._channel.recv_bytes())
        except (EOFError, OSError):
            return False
        reward, sample = self._rewards[request["function"]], Sample(*request["sample"])
        if reward.prepare is not None:
            self._prepare(reward.prepare, sample)
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            for other in (self._channel, *self._running):
                other.close()
            _score(reward, sample, writing, self._memory_bytes)
        os.close(writing)
        pipe = Connection(reading, writable=False)
        deadline = time.monotonic() + self._seconds
        self._running[pipe] = Scoring(request["task"], pid, pipe, deadline)
        return True

    def _prepare(self, prepare: Callable[[Sample], object], sample: Sample) -> None:
        """Call `prepare` for up to the time limit. The fork meets its errors again and reports
        them.
        """
        try:
            signal.setitimer(signal.ITIMER_REAL, self._seconds)
            with suppress(Exception):
                prepare(sample)
            signal.setitimer(signal.ITIMER_REAL, 0)
        except _OverdueError:
            pass

    def _finish(self, scoring: Scoring, *, is_overdue: bool = False) -> None:
        answer: Answer | None = None
        if is_overdue:
            answer = "timed out", f"more than {self._seconds:g} s"
        else:
            try:
                answer = json.loads(scoring.pipe.recv_bytes())
            except (EOFError, OSError, ValueError):
                pass  # the fork ended without an answer; its status has the reason
        status = _end(scoring, is_killed=answer is not None)
        if answer is None:
            answer = "crashed", _reason(status)
        self._channel.send_bytes(json.dumps([scoring.task, *answer]).encode())


def _score(reward: Reward, sample: Sample, writing: int, memory_bytes: int) -> NoReturn:
    """Run `reward` in this fork, write its answer to the pipe and end."""
    own = os.getpid()
    os.setsid()
    _die_with_parent()
    seed_random()  # Python gives every fork a random state
    exhausted: Answer = ("out of memory", f"more than {memory_bytes >> 20:,} MiB")
    message = json.dumps(exhausted).encode()
    _limit_memory(memory_bytes)
    try:
        checked = _checked_text if reward.is_tool else _checked
        message = json.dumps(checked(reward.score(sample))).encode()
    except MemoryError:
        pass
    except BaseException as error:  # user code can raise anything, SystemExit included
        message = json.dumps(("raised", one_line(error))).encode()
    if os.getpid() == own:  # not a fork that the function made
        Connection(writing, readable=False).send_bytes(message)
    os._exit(0)


def _checked(value: object) -> Answer:
    """The score, or why `value` is none. Raises what `value`'s conversion raises."""
    if not isinstance(value, SupportsFloat):
        return "not a number", f"{type(value).__name__} {value!r}"[:SHOWN_VALUE]
    score = float(value)
    return (None, score) if math.isfinite(score) else ("not finite", str(score))


def _checked_text(value: object) -> Answer:
    """The text of a tool, or why `value` is none. Raises UnicodeEncodeError for half a surrogate
    pair, which has no tokens.
    """
    if value is None:
        return None, None
    if not isinstance(value, str):
        return "not a text", f"{type(value).__name__} {value!r}"[:SHOWN_VALUE]
    if len(value) > LONGEST_TEXT:
        return "not a text", f"more than {LONGEST_TEXT:,} characters"
    value.encode()
    return None, value


def one_line(error: BaseException) -> str:
    """Type and text of an exception, shortened."""
    return " ".join([f"{type(error).__name__}:", *str(error).split()])[:LONGEST_DETAIL].rstrip(":")


def _end(scoring: Scoring, *, is_killed: bool = True) -> int:
    """End the fork and its children; returns the wait status."""
    scoring.pipe.close()
    if is_killed:
        _kill_group(scoring.pid)
    _, status = os.waitpid(scoring.pid, 0)
    _kill_group(scoring.pid)
    return status


def _kill_group(leader: int) -> None:
    for kill in (os.killpg, os.kill):
        try:
            kill(leader, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # ended, or not yet the leader of a group
            pass


def _reason(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exited with status {code}"
    return f"ended by {signal.Signals(-code).name}"


def _die_with_parent() -> None:
    """On Linux, let the kernel end this fork with the server, which alone limits its time."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _limit_memory(extra: int) -> None:
    """Let this process allocate `extra` bytes more than it has, on Linux."""
    if sys.platform == "linux":
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + extra
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def load_rewards(
    names: Sequence[str], context: RewardContext, function: FunctionName
) -> list[Reward]:
    """The functions of built-in rewards and files, in which they are called `function`. Raises
    UserError.
    """
    return [
        load_reward_file(Path(name), function) if is_file(name) else REWARDS[name](context)
        for name in names
    ]


def seed_random() -> None:
    """Give Python's and NumPy's global generators a fixed state."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


def main() -> None:
    """Run the server on the channel whose descriptor is the last argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is for the parent, which closes our input
    signal.signal(signal.SIGALRM, _stop_prepare)
    channel = Connection(int(sys.argv[-1]))
    os.set_inheritable(channel.fileno(), False)
    setup: dict[str, Any] = json.loads(channel.recv_bytes())
    seed_random()
    try:
        context = RewardContext(**setup["context"])
        rewards = load_rewards(setup["reward_funcs"], context, setup["function"])
    except UserError as error:
        channel.send_bytes(json.dumps(str(error)).encode())
        return
    seed_random()  # loads numpy.random here, not in every fork
    gc.collect()
    gc.freeze()  # a fork's collections then copy fewer pages
    channel.send_bytes(json.dumps(None).encode())
    ForkServer(
        channel, rewards, seconds=setup["seconds"], memory_bytes=setup["memory_bytes"]
    ).serve()
