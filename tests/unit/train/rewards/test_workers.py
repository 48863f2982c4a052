"""Reward functions in their processes: what fails is named, and nothing else changes."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowlat.train.rewards.sample import RewardFailure, Sample
from lowlat.train.rewards.workers import RewardWorkers
from lowlat.utils.errors import UserError

BEHAVIOURS = """
import os, random, signal, sys, time

calls = 0
print("loaded", flush=True)

def fork_and_return():
    os.fork()
    return 3.0

def reward(prompt, completion, record):
    global calls
    calls += 1
    print("stray output", flush=True)
    os.write(2, b"stray error output")
    actions = {
        "ok": lambda: record["value"],
        "count": lambda: calls,
        "random": lambda: random.random(),
        "prompt": lambda: len(prompt),
        "raise": lambda: 1 / 0,
        "exit": lambda: sys.exit("done"),
        "hang": lambda: time.sleep(1e6),
        "spin": lambda: [0 for _ in iter(int, 1)],
        "memory": lambda: len(bytearray(1 << 40)),
        "grow": lambda: sum(len(x) for x in [bytearray(1 << 20) for _ in range(1 << 20)]),
        "nan": lambda: float("nan"),
        "infinite": lambda: 1e308 * 10,
        "text": lambda: "1.0",
        "none": lambda: None,
        "os_exit": lambda: os._exit(3),
        "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "kill_parent": lambda: os.kill(os.getppid(), signal.SIGKILL),
        "fork": fork_and_return,
        "secret": lambda: float("LOWLAT_SECRET" in os.environ),
        "files": lambda: len(os.listdir("/proc/self/fd")),
    }
    return actions[completion]()
"""
FAILURES = {
    "raise": ("raised", "ZeroDivisionError: division by zero"),
    "exit": ("raised", "SystemExit: done"),
    "memory": ("out of memory", "more than 96 MiB"),
    "grow": ("out of memory", "more than 96 MiB"),
    "nan": ("not finite", "nan"),
    "infinite": ("not finite", "inf"),
    "text": ("not a number", "str '1.0'"),
    "none": ("not a number", "NoneType None"),
    "os_exit": ("crashed", "exited with status 3"),
    "killed": ("crashed", "ended by SIGKILL"),
    "unknown": ("raised", "KeyError: 'unknown'"),
}


@pytest.fixture(scope="module")
def behaviours(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rewards") / "behaviours.py"
    path.write_text(BEHAVIOURS)
    return str(path)


@pytest.fixture(scope="module")
def workers(behaviours: str) -> Iterator[RewardWorkers]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWLAT_SECRET", "x")
        with RewardWorkers([behaviours], memory_bytes=96 << 20) as running:
            yield running


def sample(action: str, value: float = 0.0) -> Sample:
    return Sample("question", action, {"value": value})


@pytest.mark.parametrize("action", FAILURES)
def test_a_failure_has_a_name_and_fails_its_sample_only(
    workers: RewardWorkers, behaviours: str, action: str
) -> None:
    scores = workers.score([sample("ok", 1.5), sample(action), sample("ok", -2.0)])
    assert scores == [[1.5], [RewardFailure(behaviours, *FAILURES[action])], [-2.0]]


@pytest.mark.parametrize("action", ["hang", "spin"])
def test_a_function_that_hangs_is_killed(behaviours: str, action: str) -> None:
    with RewardWorkers([behaviours], seconds=0.5, processes=3) as workers:
        scores = workers.score([sample(action), sample("raise"), sample(action)])
    late = RewardFailure(behaviours, "timed out", "more than 0.5 s")
    assert [scores[0], scores[2]] == [[late], [late]]
    assert str(late) == f"{behaviours}: timed out: more than 0.5 s"


@pytest.mark.parametrize("processes", [1, 3])
def test_a_function_that_kills_the_server_fails_alone(behaviours: str, processes: int) -> None:
    samples = [sample("kill_parent") if i == 1 else sample("ok", i) for i in range(5)]
    with RewardWorkers([behaviours], processes=processes) as workers:
        scores = workers.score(samples)
    detail = "ended the process that starts the forks"
    failure = RewardFailure(behaviours, "crashed", detail)
    assert scores == [[failure] if i == 1 else [float(i)] for i in range(5)]


def test_a_killed_server_is_replaced(behaviours: str) -> None:
    with RewardWorkers([behaviours]) as workers:
        workers._server._process.kill()
        assert workers.score([sample("ok", 1.0)]) == [[1.0]]


def test_equal_samples_are_scored_once(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text(
        "def reward(prompt, completion, record):\n"
        "    with open(record['calls'], 'a') as file:\n"
        "        file.write(completion)\n"
        "    return len(completion)\n"
    )
    record = {"calls": str(tmp_path / "calls")}
    samples = [Sample("q", text, record) for text in ("aa", "b", "aa", "b", "ccc", "aa")]
    samples.append(Sample("other", "b", record))
    with RewardWorkers([str(tmp_path / "r.py")], processes=1) as workers:
        found = workers.score(samples)
    assert found == [[2.0], [1.0], [2.0], [1.0], [3.0], [2.0], [1.0]]
    assert (tmp_path / "calls").read_text() == "aabcccb"


def test_scores_do_not_depend_on_order_or_processes(behaviours: str) -> None:
    """Global state and random generators start the same in every call."""
    actions = ("count", "random", "ok", "random", "count")
    samples = [sample(action, float(place)) for place, action in enumerate(actions)]
    with RewardWorkers([behaviours], processes=1) as workers:
        one = workers.score(samples)
    with RewardWorkers([behaviours], processes=4) as workers:
        reordered = workers.score(samples[::-1])[::-1]
    assert one == reordered
    assert one[0] == one[4] == [1.0] and one[1] == one[3]


def test_every_function_scores_every_sample(behaviours: str) -> None:
    with RewardWorkers(["length_penalty", behaviours]) as workers:
        scores = workers.score([Sample("q", "prompt", {}, 128), Sample("q", "nan", {}, 512)])
        assert workers.score([]) == []
    assert scores == [[-0.25, 1.0], [-1.0, RewardFailure(behaviours, "not finite", "nan")]]


def test_a_fork_of_the_function_does_not_answer_for_it(workers: RewardWorkers) -> None:
    assert workers.score([sample("fork"), sample("ok", 1.0), sample("fork")]) == [[3], [1], [3]]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_get_no_secrets_and_no_files(workers: RewardWorkers) -> None:
    """Standard streams, the pipe of the answer and the folder that is listed."""
    with open(os.devnull) as file:
        os.set_inheritable(file.fileno(), True)
        scores = workers.score([sample("secret"), sample("files")])
    assert scores == [[0.0], [5.0]]


def test_large_samples(workers: RewardWorkers) -> None:
    """Requests larger than a pipe's buffer, several at a time."""
    large = Sample("x" * 3_000_000, "prompt", {"text": "y" * 1_000_000})
    assert workers.score([large] * 3) == [[3e6]] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_forks_end_with_a_killed_run(tmp_path: Path) -> None:
    path, mark = tmp_path / "hang.py", tmp_path / "pid"
    path.write_text(
        "import os, time\nfrom pathlib import Path\n"
        f"def reward(prompt, completion, record):\n"
        f"    Path({str(mark)!r}).write_text(f'{{os.getpid()}}\\n')\n    time.sleep(1e6)\n"
    )
    code = (
        "from lowlat.train.rewards.sample import Sample\n"
        "from lowlat.train.rewards.workers import RewardWorkers\n"
        f"RewardWorkers([{str(path)!r}], seconds=600).score([Sample('', '', {{}})])"
    )
    run = subprocess.Popen([sys.executable, "-c", code])
    wait_until(lambda: mark.exists() and mark.read_text().endswith("\n"))
    fork = Path("/proc") / mark.read_text().strip()
    assert fork.exists()
    run.send_signal(signal.SIGKILL)
    run.wait()
    wait_until(lambda: not fork.exists() or "State:\tZ" in (fork / "status").read_text())


def wait_until(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("x = 1", "has no function reward(prompt, completion, record); define it"),
        ("reward = 1.0", "has no function reward(prompt, completion, record); define it"),
        (
            "def reward(prompt, completion): return 1.0",
            "reward(prompt, completion) must take three arguments: "
            "reward(prompt, completion, record)",
        ),
        ("def reward(:", "line 1: SyntaxError: invalid syntax; correct the file"),
        ("\nimport missing_module", "line 2: ModuleNotFoundError: No module named"),
        ("raise SystemExit(1)", "line 1: SystemExit: 1; correct the file"),
        ("import os; os._exit(1)", "ended its process; correct the file"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_unusable_files_are_one_line(tmp_path: Path, source: str | None, reason: str) -> None:
    path = tmp_path / "rewards.py"
    if source is not None:
        path.write_text(textwrap.dedent(source))
    with pytest.raises(UserError) as caught:
        RewardWorkers([str(path)])
    assert reason in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_import_their_neighbours_and_take_any_callable(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_rewards.py").write_text("VALUE = 7.0")
    path = tmp_path / "rewards.py"
    path.write_text("from neighbour_of_rewards import VALUE\nreward = lambda *arguments: VALUE")
    with RewardWorkers([str(path)]) as workers:
        assert workers.score([Sample("", "", {})]) == [[7.0]]


def test_preparing_has_the_time_limit_and_costs_other_calls_none() -> None:
    """A call that has ended while the next one is prepared has its score."""
    source = """
        import json, signal, time
        from multiprocessing import Pipe
        from lowlat.train.rewards.functions import Reward
        from lowlat.train.rewards.worker import ForkServer, _stop_prepare

        def prepare(sample):
            while sample.completion == "hang":
                try:
                    time.sleep(1e6)
                except Exception:
                    pass

        signal.signal(signal.SIGALRM, _stop_prepare)
        ours, theirs = Pipe()
        for task, completion in enumerate(["ok", "hang"]):
            sample = ["", completion, {}, 0]
            request = {"task": task, "function": 0, "sample": sample}
            ours.send_bytes(json.dumps(request).encode())
        reward = Reward(lambda sample: 1.0, prepare)
        server = ForkServer(theirs, [reward], seconds=1.0, memory_bytes=1 << 30)
        answers = []
        finish = server._finish

        def finish_and_close(scoring, **options):
            finish(scoring, **options)
            answers.append(json.loads(ours.recv_bytes()))
            if len(answers) == 2:
                ours.close()

        server._finish = finish_and_close
        server.serve()
        print(sorted(answers))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout == "[[0, None, 1.0], [1, None, 1.0]]\n"


def test_unknown_rewards_are_refused() -> None:
    with pytest.raises(UserError, match="reward_funcs: 'acuracy' is none of accuracy_reward, "):
        RewardWorkers(["acuracy"])
