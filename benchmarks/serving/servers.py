"""Servers under test: start, wait until ready, pause, stop.

A server leads its own process group. It is stopped with SIGSTOP while others are measured, because
idle thread pools spin for a while, and resumed for its turn.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from lowlat.utils.errors import UserError

HOST = "127.0.0.1"
START_SECONDS = 600.0
END_SECONDS = 15.0
LOWLAT_MODULE = "import sys; from lowlat.cli.main import run; run()"


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """Settings shared by all servers."""

    model: str
    """The checkpoint folder, or another model name for lowlat."""
    dtype: str
    threads: int
    context: int
    """Context length in tokens."""
    concurrency: int
    """Maximum number of concurrent requests."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """Command line of one kind of server."""

    name: str
    command: list[str]
    """Without host and port, whose options are the same for all."""
    settings: dict[str, str] = field(default_factory=dict)
    """Environment variables."""
    model_name: str = "model"
    """Model name in requests."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Request fields that disable end-of-sequence."""


def folder_or_name(model: str) -> str:
    """A folder as an absolute path, since the server runs in another folder; or a model name."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def lowlat_program(setup: Setup, extra: list[str]) -> Program:
    """`lowlat serve` under this interpreter."""
    options = ["--dtype", setup.dtype, "--threads", str(setup.threads)]
    options += ["--max-context", str(setup.context), "--served-model-name", "model"]
    command = [sys.executable, "-c", LOWLAT_MODULE, "serve", setup.model, *options, *extra]
    return Program(name="lowlat", command=command, extra={"ignore_eos": True})


def llama_program(setup: Setup, binary: str, gguf: Path, extra: list[str]) -> Program:
    """llama.cpp's llama-server, with a slot per concurrent request and continuous batching."""
    command = [binary, "--model", str(gguf), "--alias", "model"]
    command += ["--threads", str(setup.threads), "--threads-batch", str(setup.threads)]
    command += ["--parallel", str(setup.concurrency)]
    command += ["--ctx-size", str(setup.context * setup.concurrency)]
    return Program(name="llama.cpp", command=[*command, *extra], extra={"ignore_eos": True})


def vllm_program(setup: Setup, python: str, extra: list[str]) -> Program:
    """vLLM on the CPU; `python` is the interpreter that has it."""
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", setup.model]
    command += ["--served-model-name", "model", "--dtype", _vllm_dtype(setup.dtype)]
    command += ["--max-model-len", str(setup.context), "--max-num-seqs", str(setup.concurrency)]
    command += ["--seed", "0"]
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return Program(
        name="vllm", command=[*command, *extra], settings=settings, extra={"ignore_eos": True}
    )


def _vllm_dtype(dtype: str) -> str:
    if dtype not in ("bf16", "fp32"):
        raise UserError(f"vllm has no {dtype} experts on CPUs; leave it out or choose bf16")
    return {"bf16": "bfloat16", "fp32": "float32"}[dtype]


class Server:
    """A running server. Use as a context manager; leaving it ends the process group."""

    def __init__(self, program: Program, *, threads: int, folder: Path) -> None:
        self.program = program
        self.port = free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.log = folder / f"{program.name}.log"
        pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*program.command, "--host", HOST, "--port", str(self.port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=folder,
                env=os.environ | dict.fromkeys(pools, str(threads)) | program.settings,
                start_new_session=True,
            )

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self) -> float:
        """Seconds until /health answers 200. Raises UserError if the server exits or times out."""
        begin = time.monotonic()
        while (taken := time.monotonic() - begin) < START_SECONDS:
            if self._process.poll() is not None:
                raise UserError(
                    f"{self.program.name} ended while it started: {self.last_log_line()}"
                )
            try:
                if httpx.get(f"{self.url}/health", timeout=10.0).status_code == 200:
                    return taken
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(0.1)
        raise UserError(f"{self.program.name} was not ready after {START_SECONDS:.0f} s")

    def stop(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def end(self) -> int:
        """Terminate, then kill; returns the exit status, negative for a signal."""
        self.resume()
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            pass  # killed below
        self._signal(signal.SIGKILL)
        return self._process.wait()

    def last_log_line(self) -> str:
        """The last line of its log that has an error, else an exit code, else text: torchrun prints
        a table of failed processes after their errors."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        for pattern in (r"[Ee]rror: \S", r"exitcode +:", r"\w"):
            found = [line for line in lines if re.search(pattern, line)]
            if found:
                return found[-1].strip()[:300]
        return "its log is empty"

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            pass  # already ended


def free_port() -> int:
    """A free port."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]
