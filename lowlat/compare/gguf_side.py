"""llama.cpp through llama-cpp-python: logits, and nothing in between."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowlat.compare.side import Side
from lowlat.compare.trace import OUTPUT, Choices, Trace, Window
from lowlat.config.model import ModelConfig
from lowlat.utils.errors import UserError

SPARE_ROWS = 8


class GgufSide(Side):
    """A GGUF file read one token at a time, so that all logits come out of one kind of step."""

    unseen = "llama.cpp shows logits alone"
    takes_choices = False

    def __init__(self, path: Path, config: ModelConfig, *, label: str, precision: str) -> None:
        try:
            import llama_cpp  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError(
                f"{label} needs the package llama-cpp-python, which is not installed; "
                "install it with: pip install llama-cpp-python"
            ) from error
        self.api: Any = llama_cpp
        self.path = path
        self.label = label
        self.config = config
        self.precision = precision

    def trace(self, window: Window, choices: Choices | None = None) -> Trace:
        assert not choices, "llama.cpp takes no choices"
        if window.start:
            raise UserError(
                f"--start {window.start}: llama.cpp reads from position 0; leave it out"
            )
        trace = Trace(dtype=torch.float32)
        trace.keep(OUTPUT, "logits", self._logits(window.ids.tolist()))
        return trace

    def _logits(self, ids: list[int]) -> torch.Tensor:
        try:
            model = self.api.Llama(
                model_path=str(self.path),
                n_ctx=len(ids) + SPARE_ROWS,
                n_batch=1,
                logits_all=True,
                type_k=0,  # GGML_TYPE_F32
                type_v=0,
                verbose=False,
            )
            model.eval(ids)
        except (RuntimeError, ValueError, AssertionError, OSError) as error:
            raise UserError(f"{self.label}: llama.cpp cannot run it: {error}") from error
        return torch.from_numpy(np.asarray(model.scores[: len(ids)], dtype=np.float32).copy())
