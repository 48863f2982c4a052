"""llama.cpp through llama-cpp-python: logits, and nothing in between.

It runs in a process of its own, because a failed assertion of llama.cpp ends the process it is in.
This file is both: imported, the host's side; run, that process.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowlat.compare.side import Side, answer, cannot_import, run_apart
from lowlat.compare.trace import OUTPUT, Choices, Trace, Window
from lowlat.config.model import ModelConfig
from lowlat.utils.errors import UserError

SPARE_ROWS = 8
FP32, ERROR = 0, 4
"""ggml's number of the type, and llama.cpp's of the level of a log."""


class GgufSide(Side):
    """A GGUF file read one token at a time, so that all logits come out of one kind of step."""

    unseen = "llama.cpp shows logits alone"
    takes_choices = False

    def __init__(self, path: Path, config: ModelConfig, *, label: str, precision: str) -> None:
        try:
            import llama_cpp  # noqa: F401 # pyright: ignore[reportMissingImports]
        # Its libraries are loaded with it, and end in exceptions of many types where they cannot.
        except Exception as error:
            raise cannot_import("llama_cpp", "llama-cpp-python", error, label=label) from error
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
        with tempfile.TemporaryDirectory(prefix="lowlat-llama-") as folder:
            out = Path(folder) / "logits.npy"
            request: dict[str, object] = {
                "path": str(self.path),
                "ids": window.ids.tolist(),
                "threads": torch.get_num_threads(),
                "out": str(out),
            }
            self._run(request)
            trace.keep(OUTPUT, "logits", torch.from_numpy(np.load(out, allow_pickle=False)))
        return trace

    def _run(self, request: dict[str, object]) -> None:
        """Run the process. Raises UserError with what llama.cpp says."""
        run_apart("lowlat.compare.gguf_side", request, label=self.label)


# The process


def read(request: dict[str, Any]) -> None:
    """Read the tokens and write their logits. Raises UserError where llama.cpp refuses."""
    import llama_cpp  # pyright: ignore[reportMissingImports]

    api: Any = llama_cpp
    faults: list[str] = []

    @api.llama_log_callback
    def hear(level: int, text: bytes, _: object) -> None:
        if level == ERROR:
            faults.append(text.decode(errors="replace").strip())

    api.llama_log_set(hear, None)
    try:
        logits = _logits(api, request["path"], request["ids"], request["threads"])
    except RuntimeError as error:
        raise UserError(": ".join([f"llama.cpp {error}", *faults[:1]])) from error
    np.save(request["out"], logits)


def _logits(api: Any, path: str, ids: list[int], threads: int) -> np.ndarray:
    """By llama.cpp's functions: llama_cpp.Llama puts YaRN settings of its own before the file's."""
    api.llama_backend_init()
    settings = api.llama_model_default_params()
    settings.n_gpu_layers = 0
    # llama.cpp aborts on the graph of deepseek2 where its AMX buffers hold quantised weights
    settings.use_extra_bufts = b"AMX_INT8 = 1" not in api.llama_print_system_info()
    model = api.llama_model_load_from_file(path.encode(), settings)
    if not model:
        raise RuntimeError("cannot load it")
    options = api.llama_context_default_params()
    options.n_ctx = len(ids) + SPARE_ROWS
    options.n_threads = options.n_threads_batch = threads
    options.type_k = options.type_v = FP32
    options.flash_attn_type = 0  # it rounds to fp16
    context = api.llama_init_from_model(model, options)
    if not context:
        raise RuntimeError(f"cannot make a context of {len(ids)} tokens")
    width = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    logits = np.empty((len(ids), width), dtype=np.float32)
    for place, token in enumerate(ids):
        one = (api.llama_token * 1)(token)
        if api.llama_decode(context, api.llama_batch_get_one(one, 1)):
            raise RuntimeError(f"cannot read token {place}")
        row = api.llama_get_logits_ith(context, -1)
        logits[place] = np.ctypeslib.as_array(row, shape=(width,))
    return logits


if __name__ == "__main__":
    answer(read)
