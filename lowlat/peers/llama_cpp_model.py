"""llama.cpp as a peer, through the low-level functions of llama-cpp-python: load, logits, timing.

`llama_cpp.Llama` is not used: it overrides a file's YaRN settings with its own.
"""

import ctypes
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lowlat.peers.llama_cpp_state import extend_state
from lowlat.peers.protocol import (
    TimedModel,
    Unsupported,
    random_token_ids,
    serve_requests,
    timed_handlers,
)

FTYPES = {"Q8_0": 7, "Q4_K_M": 15}
CACHE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 8}
LOG_LEVEL_ERROR = 4


class AttentionSetup(NamedTuple):
    """llama.cpp's attention settings: data type of the KV cache, flash attention."""

    cache: str
    flash: bool


SETUPS = {
    "fp32": (AttentionSetup("F32", False),),
    "bf16": (AttentionSetup("F16", False), AttentionSetup("F16", True)),
    "int8": (
        AttentionSetup("Q8_0", True),
        AttentionSetup("F16", False),
        AttentionSetup("F16", True),
    ),
}
"""Candidates by the cache dtype of the benchmark; the fastest is timed. F16 is llama.cpp's default,
as large as bf16 and often faster than Q8_0, which requires flash attention. Flash attention rounds
to fp16, so fp32 does not use it.
"""
SPARE_TOKENS = 64
SEED_TOKENS = 64
TRIAL_TOKENS = 1024
LONGEST_PREFILL = 8192
"""Longest context to fill by a real prefill, if the saved state cannot be extended."""


class LlamaCpp(TimedModel):
    """One sequence, llama.cpp's default batch sizes, the fastest attention setup."""

    def load(
        self, *, model: str, precision: str, cache: str, threads: int, context: int
    ) -> dict[str, Any]:
        import llama_cpp  # pyright: ignore[reportMissingImports]

        self.api: Any = llama_cpp
        self._record_errors()
        llama_cpp.llama_backend_init()
        info = llama_cpp.llama_print_system_info().decode()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        # llama.cpp aborts on the graph of deepseek2 if its AMX buffers hold quantized weights
        settings.use_extra_bufts = "AMX_INT8 = 1" not in info
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), settings)
        if not self.model:
            raise Unsupported(self._failure("cannot load it"))
        setups = SETUPS[cache]
        self.contexts = {setup: self._new_context(threads, context, setup) for setup in setups}
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self.model)
        )
        self.setups = {"prefill": setups[0], "decode": setups[0]}
        self._use("prefill")
        if len(setups) > 1 and context >= TRIAL_TOKENS:
            self._choose_setups()
        return {
            "version": llama_cpp.__version__,
            "system_info": info,
            "extra_buffers": bool(settings.use_extra_bufts),
            "flash_attention": {phase: setup.flash for phase, setup in self.setups.items()},
            "cache_type": {phase: setup.cache for phase, setup in self.setups.items()},
        }

    def prefill(self, ids: Sequence[int]) -> Any:
        self._use("prefill")
        return self._run_prompt(ids)

    def fill_cache(self, context: int) -> None:
        self._use("decode")
        self._run_prompt(random_token_ids(min(SEED_TOKENS, context), self.vocab_size))
        if context <= SEED_TOKENS:
            return
        size = self.api.llama_state_seq_get_size(self.context, 0)
        state = (ctypes.c_uint8 * size)()
        self.api.llama_state_seq_get_data(self.context, state, size, 0)
        extended = extend_state(bytes(state), context)
        if extended is None and context > LONGEST_PREFILL:
            raise Unsupported(f"the prefill of {context:,} tokens takes too long")
        if extended is None:
            self._run_prompt(random_token_ids(context, self.vocab_size))
            return
        self.api.llama_memory_clear(self.memory, True)
        data = (ctypes.c_uint8 * len(extended)).from_buffer(extended)
        if not self.api.llama_state_seq_set_data(self.context, data, len(extended), 0):
            raise RuntimeError(self._failure("rejects the filled cache"))

    def decode_step(self, token: int, position: int) -> Any:
        self._decode([token])
        return self._last_logits()

    def logits(self, ids: Sequence[int]) -> Any:
        """Logits by steps of one token, so that all come from the same kernels."""
        import numpy

        self._use("decode")
        self.api.llama_memory_clear(self.memory, True)
        rows = []
        for token in ids:
            self._decode([token])
            rows.append(self._last_logits())
        return numpy.stack(rows)

    def _new_context(self, threads: int, context: int, setup: AttentionSetup) -> Any:
        options = self.api.llama_context_default_params()
        options.n_ctx = context + SPARE_TOKENS
        options.n_threads = options.n_threads_batch = threads
        options.type_k = options.type_v = CACHE_TYPES[setup.cache]
        options.flash_attn_type = int(setup.flash)
        options.no_perf = True
        made = self.api.llama_init_from_model(self.model, options)
        if not made:
            raise Unsupported(self._failure(f"cannot make a context of {context} tokens"))
        return made

    def _use(self, phase: str) -> None:
        """Switch to the context of "prefill" or "decode"."""
        self.context = self.contexts[self.setups[phase]]
        self.memory = self.api.llama_get_memory(self.context)
        self.batch = self.api.llama_n_batch(self.context)

    def _choose_setups(self) -> None:
        """Select the fastest attention setup for prefill and for decode."""
        ids = random_token_ids(TRIAL_TOKENS, self.vocab_size)
        trials = {
            "prefill": lambda: self.prefill(ids),
            "decode": lambda: self.decode_step(ids[0], TRIAL_TOKENS),
        }
        for phase, trial in trials.items():
            times = {}
            for setup in self.contexts:
                self.setups[phase] = setup
                if phase == "decode":
                    self.fill_cache(TRIAL_TOKENS)
                times[setup] = min(_seconds(trial) for _ in range(3))
            self.setups[phase] = min(times, key=lambda setup: times[setup])

    def _run_prompt(self, ids: Sequence[int]) -> Any:
        self.api.llama_memory_clear(self.memory, True)
        for start in range(0, len(ids), self.batch):
            self._decode(ids[start : start + self.batch])
        return self._last_logits()

    def _decode(self, ids: Sequence[int]) -> None:
        tokens = (self.api.llama_token * len(ids))(*ids)
        if self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError(self._failure("cannot decode"))

    def _last_logits(self) -> Any:
        import numpy

        row = self.api.llama_get_logits_ith(self.context, -1)
        return numpy.ctypeslib.as_array(row, shape=(self.vocab_size,)).copy()

    def _record_errors(self) -> None:
        """Copy llama.cpp's log to stderr and its errors to `self.errors`."""
        self.errors: list[str] = []

        @self.api.llama_log_callback
        def record(level: int, text: bytes, _: object) -> None:
            line = text.decode(errors="replace")
            print(line, end="", file=sys.stderr)
            if level == LOG_LEVEL_ERROR:
                self.errors.append(line.strip())

        self.log_callback = record  # llama.cpp keeps a pointer to it
        self.api.llama_log_set(record, None)

    def _failure(self, what: str) -> str:
        return ": ".join([f"llama.cpp {what}", *self.errors[:1]])


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def quantize(source: str, target: str, kind: str, threads: int) -> dict[str, Any]:
    """Write the GGUF file `source` as `target` in `kind`, one of FTYPES."""
    import llama_cpp  # pyright: ignore[reportMissingImports]

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = FTYPES[kind], threads
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), options):
        raise RuntimeError(f"llama.cpp cannot quantize {source} to {kind}; its log has the reason")
    return {}


if __name__ == "__main__":
    serve_requests(timed_handlers(LlamaCpp()) | {"quantize": quantize})
