"""Workers: answers, failures as PeerError or UserError, suspension of idle ones."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from lowlat.peers.worker import NotInstalled, PeerError, Worker
from lowlat.utils.errors import UserError

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def state(worker: Worker) -> str:
    stat = Path(f"/proc/{worker._process.pid}/stat").read_text()
    return stat.rpartition(")")[2].split()[0]


def load(worker: Worker) -> dict[str, object]:
    return worker.ask("load", model="m", precision="bf16", cache="bf16", threads=1, context=8)


def test_answers_are_not_mixed_with_what_programs_print(worker: Worker) -> None:
    assert load(worker) == {"precision": "bf16", "threads": "1"}
    assert "output of the program" in worker.log.read_text()


def test_requests_follow_one_another(worker: Worker) -> None:
    load(worker)
    assert worker.ask("first_token", ids=[3]) == {"token": 4}
    assert worker.ask("prefill", tokens=7)["seconds"] > 0


@linux
def test_an_idle_worker_is_stopped(worker: Worker) -> None:
    """Regression: thread pools that spin while another program is measured."""
    load(worker)
    until = time.monotonic() + 60
    while state(worker) != "T" and time.monotonic() < until:
        time.sleep(0.01)
    assert state(worker) == "T"


def test_an_unsupported_request_leaves_the_worker_usable(worker: Worker) -> None:
    load(worker)
    with pytest.raises(PeerError, match="thirteen is too many"):
        worker.ask("prefill", tokens=13)
    assert worker.ask("first_token", ids=[1]) == {"token": 2}


@pytest.mark.parametrize(
    ("kind", "says"),
    [("raise", "failed: RuntimeError: first line second line"), ("memory", "failed: MemoryError")],
)
def test_an_exception_is_one_line(worker: Worker, kind: str, says: str) -> None:
    with pytest.raises(PeerError, match=f"^{says}$"):
        worker.ask("fail", kind=kind)
    assert "Traceback" in worker.log.read_text()


def test_the_error_of_an_ended_worker_has_its_last_line(worker: Worker) -> None:
    with pytest.raises(PeerError, match=r"^ended with 3; the reason for its end$"):
        worker.ask("fail", kind="exit")
    with pytest.raises(PeerError, match="the reason for its end"):
        worker.ask("prefill", tokens=1)


def test_the_error_of_an_aborted_worker_names_the_signal(worker: Worker) -> None:
    with pytest.raises(PeerError, match="killed by SIGABRT"):
        worker.ask("fail", kind="abort")


def test_the_error_of_a_killed_worker_names_the_signal(worker: Worker) -> None:
    os.kill(worker._process.pid, signal.SIGKILL)
    with pytest.raises(PeerError, match="killed by SIGKILL"):
        worker.ask("prefill", tokens=1)


def test_a_worker_that_does_not_answer_times_out(worker: Worker) -> None:
    with pytest.raises(PeerError, match="no answer within 1 s"):
        worker.ask("fail", kind="hang", timeout=1.0)
    with pytest.raises(PeerError, match="no answer"):
        worker.ask("prefill", tokens=1)


def test_a_missing_package_names_the_interpreter(worker: Worker) -> None:
    with pytest.raises(NotInstalled, match=r"not installed for .*--peers fake=PYTHON"):
        worker.ask("fail", kind="absent")


def test_user_errors_pass_through(worker: Worker) -> None:
    with pytest.raises(UserError, match=r"^dtype 'x' is unknown; choose another$"):
        worker.ask("fail", kind="user")


@linux
@pytest.mark.parametrize("stopped", [False, True])
def test_closing_ends_the_process(fake_path: None, tmp_path: Path, stopped: bool) -> None:
    worker = Worker("fake", "fake_worker", python=sys.executable, threads=1, folder=tmp_path)
    if stopped:
        load(worker)
    worker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(worker._process.pid, 0)
    with pytest.raises(PeerError, match="closed"):
        worker.ask("prefill", tokens=1)
