"""`lowlat serve` and other verbs under torchrun: answers of one process; errors, not hangs, when a
process is killed or stopped.
"""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

import lowlat
from lowlat.config.serving_layout import ServingLayout
from tests import forked

from .launch import PATIENCE, finish, kill, torchrun
from .measured import SECONDS as ADDED_SECONDS
from .processes import listening_hosts
from .refusals import NAMES

if sys.platform != "linux":
    pytest.skip("reads /proc", allow_module_level=True)

MODEL = "minnow"
RANKED, MEASURED = (str(Path(__file__).with_name(f"{name}.py")) for name in ("ranked", "measured"))
PROMPT = "The sea"
ENDLESS = {"model": MODEL, "prompt": PROMPT, "max_tokens": 1900, "ignore_eos": True, "stream": True}
LAYOUT = ["--parallel", "pipeline=2", "--threads", "1"]
APART = ["--parallel", "prefill=1", "--threads", "1"]


@dataclass
class Served:
    """A server of several processes."""

    launcher: subprocess.Popen[str]
    pids: Path
    """Folder with the process id of each rank."""
    url: str = ""
    lines: list[str] = field(default_factory=list)
    """What it has written to stderr."""

    def read_url(self) -> None:
        """Wait until the server accepts connections."""
        assert self.launcher.stdout is not None
        greeting = self.launcher.stdout.readline()
        found = re.search(r"http://\S+", greeting)
        assert found is not None, greeting + "".join(self.lines)
        self.url = found[0]

    def pid(self, rank: int) -> int:
        return int((self.pids / f"{rank}").read_text())


@contextlib.contextmanager
def serving(*options: str, restarts: int = 0, layout: Sequence[str] = LAYOUT) -> Iterator[Served]:
    """A server of two processes, which is killed at the end."""
    with tempfile.TemporaryDirectory() as pids:
        command = [RANKED, pids, "serve", MODEL, "--port", "0", *layout, *options]
        launcher = torchrun(2, *command, restarts=restarts)
        assert launcher.stdout is not None and launcher.stderr is not None
        server, errors = Served(launcher, Path(pids)), launcher.stderr
        reader = threading.Thread(target=lambda: server.lines.extend(errors), daemon=True)
        reader.start()
        try:
            server.read_url()
            yield server
        finally:
            kill(launcher)
            reader.join(PATIENCE)
            launcher.stdout.close()
            errors.close()


@pytest.mark.slow
@pytest.mark.parametrize("layout", [LAYOUT, APART], ids=["pipeline", "prefill"])
def test_answers_are_those_of_one_process(layout: list[str]) -> None:
    prompt = PROMPT * 100
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 30, "temperature": 0}
    with serving(layout=layout) as server:
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE).json()
        metrics = httpx.get(f"{server.url}/metrics", timeout=PATIENCE).text
        hosts = [listening_hosts(server.pid(rank)) for rank in (0, 1)]
        # SIGTERM reaches all processes: process 0 ends the others.
        os.kill(server.launcher.pid, signal.SIGTERM)
        server.launcher.wait(PATIENCE)
    alone = lowlat.load(MODEL).generate(prompt, max_tokens=30, temperature=0)
    assert answer["choices"][0]["text"] == str(alone)
    (tokens,) = re.findall(r"^lowlat:kv_transfer_tokens_total\S* (\S+)$", metrics, re.MULTILINE)
    assert (float(tokens) > 0) == (layout is APART)
    # gloo and, in process 0, HTTP; no other address
    assert hosts == [{"127.0.0.1"}, {"127.0.0.1"}]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "number"),
    [(LAYOUT, signal.SIGKILL), (LAYOUT, signal.SIGSTOP), (APART, signal.SIGKILL)],
    ids=["killed", "stopped", "prefill killed"],
)
def test_a_lost_process_ends_requests_and_server(layout: list[str], number: signal.Signals) -> None:
    with serving(layout=layout) as server:
        rest = remaining_events(server, lambda: os.kill(server.pid(1), number))
        assert "error" in json.loads(rest[-1].removeprefix("data: ")), rest[-3:]
        # 503 for GRACE_SECONDS, unless this test is too slow to ask
        assert health(server) in (503, None)
        assert server.launcher.wait(PATIENCE) == 1
    assert any("no longer answers" in line or "lost" in line for line in server.lines)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_without_process_0_connections_end(number: signal.Signals) -> None:
    """Others of its machine kill a stopped process 0, which cannot answer."""
    with serving() as server:
        with pytest.raises(httpx.TransportError):
            remaining_events(server, lambda: os.kill(server.pid(0), number))
        assert health(server) is None
        assert server.launcher.wait(PATIENCE) == 1


@pytest.mark.slow
def test_a_process_out_of_memory_ends_requests_and_server() -> None:
    """Allocations fail from some moment on, and a long prompt needs memory."""

    def run_out() -> None:
        limit = (1, resource.RLIM_INFINITY)
        resource.prlimit(server.pid(1), resource.RLIMIT_AS, limit)
        body = {"model": MODEL, "prompt": "The sea. " * 500, "max_tokens": 1}
        url = f"{server.url}/v1/completions"
        threading.Thread(target=post, args=(url, body), daemon=True).start()

    def post(url: str, body: dict[str, object]) -> None:
        with contextlib.suppress(httpx.HTTPError):
            httpx.post(url, json=body, timeout=PATIENCE)

    with serving() as server:
        rest = remaining_events(server, run_out)
        assert "error" in json.loads(rest[-1].removeprefix("data: ")), rest[-3:]
        assert health(server) in (503, None)
        assert server.launcher.wait(PATIENCE) == 1
    assert any("process 1 of 2 failed: " in line for line in server.lines)


@pytest.mark.slow
def test_a_restarted_run_has_its_prefix_cache(tmp_path: Path) -> None:
    """torchrun starts all processes again; prompts of before are in the cache on disk."""
    prompt = " ".join(f"word{number}" for number in range(200))
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 8, "temperature": 0}

    def answer(server: Served) -> tuple[str, int]:
        found = httpx.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE).json()
        usage = found["usage"]["prompt_tokens_details"]
        return found["choices"][0]["text"], usage["cached_tokens"]

    options = ["--prefix-cache-dir", str(tmp_path / "cache")]
    with serving(*options, restarts=1) as server:
        text, cached = answer(server)
        assert cached == 0
        wait_for_pages(tmp_path / "cache")
        os.kill(server.pid(1), signal.SIGKILL)
        server.read_url()
        again, cached = answer(server)
    assert again == text
    assert cached > 0


def remaining_events(server: Served, strike: Callable[[], None]) -> list[str]:
    """Events of a request after `strike`, a fault. Prints the seconds until its end. Raises
    TransportError if the connection ends before the response."""
    endless = httpx.stream("POST", f"{server.url}/v1/completions", json=ENDLESS, timeout=PATIENCE)
    with endless as response:
        events = response.iter_lines()
        next(events)
        strike()
        started = time.monotonic()
        try:
            return [line for line in events if line]
        finally:
            print(f"ended after {time.monotonic() - started:.1f} s")


def wait_for_pages(folder: Path) -> None:
    """Wait until a page is in the prefix cache on disk."""
    deadline = time.monotonic() + PATIENCE
    while not any(folder.glob("*/*/*")):
        assert time.monotonic() < deadline, [*folder.rglob("*")]
        time.sleep(0.1)


def health(server: Served) -> int | None:
    """Status of /health; None if the server has ended."""
    try:
        return httpx.get(f"{server.url}/health", timeout=PATIENCE).status_code
    except httpx.TransportError:
        return None


@pytest.mark.slow
def test_generate() -> None:
    arguments = ["-m", "lowlat", "generate", MODEL, "-p", PROMPT, "--raw", "--json", *LAYOUT]
    code, output, errors = finish(torchrun(2, *arguments, "--max-tokens", "20"))
    assert code == 0, errors
    alone = lowlat.load(MODEL).generate(PROMPT, max_tokens=20)
    assert json.loads(output)["completions"][0]["text"] == str(alone)


@pytest.mark.slow
def test_auto_benchmarks_a_process_per_node(tmp_path: Path) -> None:
    """Without torchrun: each process on the processor of its node; bytes as of the formula."""
    cpus = sorted(os.sched_getaffinity(0))[:2]
    if len(cpus) < 2:
        pytest.skip("needs two processors")
    nodes = tmp_path / "nodes"
    nodes.write_text("".join(f"{cpu},{node},{node}\n" for node, cpu in enumerate(cpus)))
    options = ["--prefill", "70", "--decode", "9", "--rounds", "1", "--json", "--dtype", "bf16"]
    command = [sys.executable, "-m", "lowlat", "bench", MODEL, "--parallel", "auto", *options]
    ended = forked.run(
        command,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=os.environ | {"LOWLAT_TOPOLOGY": str(nodes), forked.CHILDREN: "1"},
    )
    assert ended.returncode == 0, ended.stderr
    assert "2 NUMA nodes, 2 cores, so 2 processes" in ended.stderr
    found = json.loads(ended.stdout)
    assert [row["not_measured"] for row in found["rows"]] == [None, None]
    layout = ServingLayout.parse(found["parallel"]["layout"])
    assert layout.tensor == 2 and layout.pipeline == 1
    assert [process["cpus"] for process in found["parallel"]["processes"]] == [[cpus[0]], [cpus[1]]]
    for case in found["parallel"]["traffic"]:
        for process in case["processes"]:
            assert process["messages"] == process["formula_messages"], case
            # outputs of experts are padded to the busiest process, of which the formula is a mean
            assert process["bytes"] == pytest.approx(process["formula_bytes"], rel=0.3), case


@pytest.mark.slow
def test_auto_is_one_process_on_one_node(tmp_path: Path) -> None:
    node = tmp_path / "node"
    node.write_text("0,0,0\n1,1,0\n")
    arguments = ["generate", MODEL, "-p", PROMPT, "--raw", "--max-tokens", "3", "--threads", "1"]
    ended = forked.run(
        [sys.executable, "-m", "lowlat", *arguments, "--parallel", "auto"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=os.environ | {"LOWLAT_TOPOLOGY": str(node)},
    )
    assert ended.returncode == 0 and ended.stdout
    assert "lowlat: --parallel auto: 1 NUMA node, 2 cores, so one process\n" in ended.stderr


@pytest.mark.slow
def test_a_plan_measures_its_processes_and_their_messages() -> None:
    """`--machine here` under torchrun: a device per process, and one answer."""
    arguments = ["plan", "serve", MODEL, "--machine", "here", "--context", "64", "--json"]
    code, output, errors = finish(torchrun(2, MEASURED, *arguments, "--parallel", "tensor=2"))
    assert code == 0, errors
    found = json.loads(output)
    assert found["machine"] == {"name": "here", "devices": 2}
    (layout,) = found["layouts"]
    messages_per_process = layout["messages_per_step"] / 2
    latency = layout["decode_step_seconds"]["messages"] / messages_per_process
    # A divided step of the small model has 4 messages in each of 8 layers, and the LM head's. On a
    # busy machine the whole step, which is subtracted, takes long, too.
    assert latency * (4 * 8 + 1) > 0.3 * ADDED_SECONDS


@pytest.mark.slow
def test_processes_that_differ_are_refused() -> None:
    code, output, errors = finish(torchrun(2, str(Path(__file__).with_name("refusals.py")), MODEL))
    assert code == 0, errors
    for name in NAMES:
        pattern = f"refused: process 1 of 2 differs from process 0 in its {name}: another, not"
        assert output.count(pattern) == 1, output


@pytest.mark.slow
def test_tensor_parallelism_without_kernels_is_refused() -> None:
    """PyTorch would give other bits; one process says so."""
    arguments = ["-m", "lowlat", "generate", MODEL, "-p", "x", "--parallel", "tensor=2"]
    code, _, errors = finish(torchrun(2, *arguments, "--dtype", "fp32", "--threads", "1"))
    assert code != 0
    assert errors.count("lowlat: error: tensor=2: rounding in PyTorch depends on") == 1, errors


def test_other_numbers_of_processes_are_refused() -> None:
    """Without torchrun there is one process."""
    command = [sys.executable, "-m", "lowlat", "generate", MODEL, "-p", "x", *LAYOUT]
    ended = forked.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert "--parallel pipeline=2 is for 2 processes, 1 started" in line
