"""Peers that run in worker processes: llama.cpp, and the user's copy of DeepSeek's model.py."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from lowlat.compare.implementations.base import REMEDY, Implementation, import_error
from lowlat.compare.trace import (
    NONE_IMPOSED,
    OUTPUT,
    ImposedChoices,
    Trace,
    Window,
    load_trace,
)
from lowlat.config.model import MLAConfig, ModelConfig
from lowlat.peers.worker import NotInstalled, PeerError, UnsupportedRequest, Worker
from lowlat.utils.device import dtype_name
from lowlat.utils.errors import UserError

DEEPSEEK = "lowlat.compare.implementations.deepseek_worker"
LLAMA_CPP = "lowlat.peers.llama_cpp_model"
TIMEOUT = 3600.0
"""Seconds for loading, and for one window."""


class DeepSeekModel(Implementation):
    """The public model.py with the weights of a Hugging Face checkpoint."""

    unseen = "model.py has no MTP modules, and does not return its router scores"
    can_impose_experts = True
    can_impose_tokens = False

    def __init__(
        self, script: Path, path: Path, config: ModelConfig, *, label: str, dtype: torch.dtype
    ) -> None:
        if not script.is_file():
            raise UserError(
                f"{label}: '{script}' is not a file; give the path of DeepSeek's inference/model.py"
            )
        if not isinstance(config.attention, MLAConfig) or not config.attention.kv_a_layernorm:
            raise UserError(f"{label}: model.py runs DeepSeek models only, and this is none")
        self.script, self.path = script, path
        self.config = config
        self.label = label
        self.dtype = dtype
        self.precision = dtype_name(dtype)

    def trace(self, window: Window, imposed: ImposedChoices = NONE_IMPOSED) -> Trace:
        assert not imposed.tokens, "model.py has no sparse attention"
        with tempfile.TemporaryDirectory(prefix="lowlat-deepseek-") as name:
            folder = Path(name)
            experts = {
                str(block.number): value.contiguous()
                for block, value in imposed.experts.items()
                if block.stage == "layer"
            }
            save_file(experts, folder / "in")
            request = {
                "op": "trace",
                "script": str(self.script.resolve()),
                "path": str(self.path.resolve()),
                "dtype": self.precision,
                "ids": window.ids.tolist(),
                "start": window.start,
                "choices": str(folder / "in"),
                "out": str(folder / "out"),
            }
            run_in_worker(DEEPSEEK, [request], label=self.label)
            return load_trace(folder / "out", self.dtype)


class LlamaCppModel(Implementation):
    """A GGUF file in llama.cpp with an fp32 KV cache, one token per step."""

    unseen = "llama.cpp shows logits only"
    can_impose_experts = can_impose_tokens = False

    def __init__(self, path: Path, config: ModelConfig, *, label: str, precision: str) -> None:
        try:
            import llama_cpp  # noqa: F401 # pyright: ignore[reportMissingImports]
        # Its shared libraries load on import, and errors have many exception types.
        except Exception as error:
            raise import_error("llama_cpp", "llama-cpp-python", error, label=label) from error
        self.path = path
        self.label = label
        self.config = config
        self.precision = precision

    def trace(self, window: Window, imposed: ImposedChoices = NONE_IMPOSED) -> Trace:
        assert imposed == NONE_IMPOSED, "choices cannot be imposed on llama.cpp"
        if window.start:
            raise UserError(
                f"--start {window.start}: llama.cpp starts at position 0; leave --start out"
            )
        ids = window.ids.tolist()
        trace = Trace(dtype=torch.float32)
        with tempfile.TemporaryDirectory(prefix="lowlat-llama-") as folder:
            out = Path(folder) / "logits.npy"
            load = {
                "op": "load",
                "model": str(self.path.resolve()),
                "precision": self.precision,
                "cache": "fp32",
                "threads": torch.get_num_threads(),
                "context": len(ids),
            }
            run_in_worker(
                LLAMA_CPP, [load, {"op": "logits", "ids": ids, "path": str(out)}], label=self.label
            )
            trace.record(OUTPUT, "logits", torch.from_numpy(np.load(out, allow_pickle=False)))
        return trace


def run_in_worker(module: str, requests: Sequence[dict[str, Any]], *, label: str) -> None:
    """Send `requests` to a new worker process that runs lowlat's `module`, then end it.

    Peers run in separate processes, because a failed assertion of llama.cpp ends its process and
    DeepSeek's model.py is the user's code. Raises UserError, in one line, if the worker fails.
    """
    with tempfile.TemporaryDirectory(prefix="lowlat-compare-") as folder:
        place = Path(folder)
        name = module.rpartition(".")[2]
        with Worker(name, module, python=sys.executable, threads=None, folder=place) as worker:
            try:
                for request in requests:
                    worker.ask(timeout=TIMEOUT, **request)
            except NotInstalled as error:
                raise UserError(f"{label}: fails at run time: {error.detail}; {REMEDY}") from error
            except (UserError, UnsupportedRequest) as error:
                raise UserError(f"{label}: {error}") from error
            except PeerError as error:
                raise UserError(f"{label}: fails at run time: {error}; {REMEDY}") from error
