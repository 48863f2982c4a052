"""RewardWorkers and ToolWorkers: call users' functions on samples in worker processes; a failing
function fails its sample by name.

Owns the process of `rewards.worker` from this side: start, requests, restart and end.
"""

import json
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, cast, final

from lowlat.train.rewards.functions import REWARDS
from lowlat.train.rewards.interpreter import command, environment
from lowlat.train.rewards.reward_file import is_file
from lowlat.train.rewards.sample import (
    FailureKind,
    FunctionName,
    Result,
    RewardContext,
    RewardFailure,
    Sample,
    Score,
    ToolAnswer,
)
from lowlat.utils.errors import UserError

START_SECONDS = 300.0
"""For the imports of reward functions; some take seconds on a busy machine."""
CLOSING_SECONDS = 10.0

Task = tuple[int, int]
"""Indices of a sample and of a reward function."""


def check_reward_funcs(names: Sequence[str], key: str = "reward_funcs") -> None:
    """Raises UserError, starting with `key`, for a name that is neither a built-in reward nor a
    Python file.
    """
    for name in names:
        if not is_file(name) and name not in REWARDS:
            known = ", ".join(REWARDS)
            raise UserError(f"{key}: {name!r} is none of {known}, or a file NAME.py")


@final
class RewardWorkers:
    """Reward functions in processes of their own. Use as a context manager.

    Scores are those of one process, and do not depend on the order of the samples: each call of a
    function has a fork of the same process. The time limit is real time.
    """

    def __init__(
        self,
        reward_funcs: Sequence[str],
        *,
        context: RewardContext | None = None,
        processes: int = 2,
        seconds: float = 30.0,
        memory_bytes: int = 1 << 30,
        key: str = "reward_funcs",
        function: FunctionName = "reward",
    ) -> None:
        """Start the process, which loads the functions.

        reward_funcs: names of REWARDS or paths of Python files. processes: forks at a time.
        seconds, memory_bytes: limits per call of a function; memory on Linux only. key: in errors,
        what names the functions. function: its name in files.

        Raises UserError for an unknown name, a missing package or an unusable file.
        """
        check_reward_funcs(reward_funcs, key)
        self._names = tuple(reward_funcs)
        self._processes = processes
        self._setup = {
            "reward_funcs": self._names,
            "context": asdict(context or RewardContext()),
            "seconds": seconds,
            "memory_bytes": memory_bytes,
            "function": function,
        }
        self._key = key
        self._server = _Server(self._setup, key)

    def __enter__(self) -> "RewardWorkers":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        self._server.close()

    def score(self, samples: Sequence[Sample]) -> list[list[Score]]:
        """The score of each reward function, in the order of reward_funcs, for each sample."""
        return cast("list[list[Score]]", self.call(samples))

    def call(self, samples: Sequence[Sample]) -> list[list[Result]]:
        """The result of each function for each sample. Equal samples are one call."""
        keys = [_key(sample) for sample in samples]
        first = {key: place for place, key in reversed(list(enumerate(keys)))}
        places = sorted(first.values())
        scores = dict(zip(places, self._call([samples[p] for p in places]), strict=True))
        return [scores[first[key]] for key in keys]

    def _call(self, samples: Sequence[Sample]) -> list[list[Result]]:
        """As `call`, of samples that differ."""
        tasks = [(s, f) for s in range(len(samples)) for f in range(len(self._names))]
        scores: dict[Task, Result] = {}
        while rest := [task for task in tasks if task not in scores]:
            # If the process dies, one of these tasks has ended it; alone, each has its own score.
            for task in self._run(rest, samples, scores, at_a_time=self._processes):
                if self._run([task], samples, scores, at_a_time=1):
                    detail = "ended the process that starts the forks"
                    scores[task] = RewardFailure(self._names[task[1]], "crashed", detail)
        return [[scores[s, f] for f in range(len(self._names))] for s in range(len(samples))]

    def _run(
        self,
        tasks: Sequence[Task],
        samples: Sequence[Sample],
        scores: dict[Task, Result],
        *,
        at_a_time: int,
    ) -> list[Task]:
        """Add the scores of `tasks`. If the process dies, replace it and return those it ran."""
        waiting, running = list(enumerate(tasks))[::-1], dict[int, Task]()
        try:
            while waiting or running:
                while waiting and len(running) < at_a_time:
                    number, task = waiting.pop()
                    running[number] = task
                    self._server.send(number, task, samples[task[0]])
                number, kind, result = self._server.receive()
                task = running.pop(number)
                scores[task] = self._scored(task, kind, result)
        except (EOFError, OSError):
            self._server.close()
            self._server = _Server(self._setup, self._key)
        return list(running.values())

    def _scored(self, task: Task, kind: FailureKind | None, result: Any) -> Result:
        name = self._names[task[1]]
        return result if kind is None else RewardFailure(name, kind, result)


@final
class ToolWorkers:
    """The tool of a Python file, in processes as those of rewards."""

    def __init__(
        self, path: str, *, seconds: float = 30.0, memory_bytes: int = 1 << 30, key: str = "tool"
    ) -> None:
        """As of RewardWorkers. Raises UserError for an unusable file."""
        if not is_file(path):
            raise UserError(f"{key}: {path!r} is no Python file NAME.py")
        self._workers = RewardWorkers(
            [path], seconds=seconds, memory_bytes=memory_bytes, key=key, function="tool"
        )

    def close(self) -> None:
        """End the processes."""
        self._workers.close()

    def score(self, samples: Sequence[Sample]) -> list[list[ToolAnswer]]:
        """The answer to each of `samples`, turns of a rollout, as a list of one."""
        return cast("list[list[ToolAnswer]]", self._workers.call(samples))


def _key(sample: Sample) -> str:
    """Equal for equal samples."""
    return json.dumps([sample.prompt, sample.completion, sample.record, sample.num_tokens])


class _Server:
    """The running process of `rewards.worker`."""

    def __init__(self, setup: Mapping[str, Any], key: str) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                command("lowlat.train.rewards.worker", str(theirs.fileno())),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment(),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._channel = Connection(ours.detach())
        try:
            self._start(setup, key)
        except BaseException:
            self.close()
            raise

    def _start(self, setup: Mapping[str, Any], key: str) -> None:
        names = ", ".join(setup["reward_funcs"])
        try:
            self._channel.send_bytes(json.dumps(setup).encode())
            if not self._channel.poll(START_SECONDS):
                limit = f"more than {START_SECONDS:g} s"
                raise UserError(f"{key}: loading {names} takes {limit}; shorten the imports")
            error = json.loads(self._channel.recv_bytes())
        except (EOFError, OSError) as error:
            raise UserError(
                f"{key}: loading {names} ended its process; correct the file"
            ) from error
        if error is not None:
            raise UserError(f"{key}: {error}")

    def send(self, number: int, task: Task, sample: Sample) -> None:
        fields = [sample.prompt, sample.completion, sample.record, sample.num_tokens]
        request = {"task": number, "function": task[1], "sample": fields}
        self._channel.send_bytes(json.dumps(request).encode())

    def receive(self) -> tuple[int, FailureKind | None, Any]:
        """(task, None, score) or (task, kind of the failure, detail)."""
        return tuple(json.loads(self._channel.recv_bytes()))

    def close(self) -> None:
        """End the process and its forks."""
        self._channel.close()
        try:
            self._process.wait(CLOSING_SECONDS)
        except subprocess.TimeoutExpired:  # on a busy machine; the kernel ends its forks
            self._process.kill()
            self._process.wait()
