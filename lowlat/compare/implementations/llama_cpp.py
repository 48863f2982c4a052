"""llama.cpp as an implementation: logits only, from a worker process of `peers.llama_cpp_model`."""

import tempfile
from pathlib import Path

import numpy as np
import torch

from lowlat.compare.implementations.base import Implementation, import_error, run_in_worker
from lowlat.compare.trace import OUTPUT, RoutedExperts, Trace, Window
from lowlat.config.model import ModelConfig
from lowlat.utils.errors import UserError

WORKER = "lowlat.peers.llama_cpp_model"


class LlamaCppModel(Implementation):
    """A GGUF file in llama.cpp with an fp32 KV cache, one token per step."""

    unseen = "llama.cpp shows logits only"
    can_impose_experts = False

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

    def trace(self, window: Window, experts: RoutedExperts | None = None) -> Trace:
        assert not experts, "experts cannot be imposed on llama.cpp"
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
                WORKER, [load, {"op": "logits", "ids": ids, "path": str(out)}], label=self.label
            )
            trace.record(OUTPUT, "logits", torch.from_numpy(np.load(out, allow_pickle=False)))
        return trace
