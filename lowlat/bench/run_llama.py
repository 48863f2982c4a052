"""Worker: llama.cpp through the low-level functions of llama-cpp-python."""

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lowlat.bench.llama_state import extended
from lowlat.bench.protocol import Refusal, Stepper, serve, steps_of, token_ids

FTYPES = {"Q8_0": 7, "Q4_K_M": 15}
CACHE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 8}


class Way(NamedTuple):
    """How llama.cpp does attention: what its cache holds, and flash attention on or off."""

    cache: str
    flash: bool


WAYS = {
    "fp32": (Way("F32", False),),
    "bf16": (Way("F16", False), Way("F16", True)),
    "int8": (Way("Q8_0", True), Way("F16", False), Way("F16", True)),
}
"""Of which it takes the fastest: F16 is its default, of bf16's size, and may be faster than Q8_0,
which only flash attention reads.
"""
SPARE_ROWS = 64
SEED_TOKENS = 64
TRIAL_TOKENS = 1024
LONGEST_REAL = 8192
"""Where the cache cannot be filled through the saved state, longer prompts are not read."""


class LlamaCpp(Stepper):
    """One sequence, llama.cpp's default batch sizes, attention in the way that is fastest."""

    def load(
        self, *, model: str, precision: str, cache: str, threads: int, context: int
    ) -> dict[str, Any]:
        import llama_cpp  # pyright: ignore[reportMissingImports]

        self.api: Any = llama_cpp
        llama_cpp.llama_backend_init()
        info = llama_cpp.llama_print_system_info().decode()
        settings = llama_cpp.llama_model_default_params()
        # llama.cpp aborts on the graph of deepseek2 where its AMX buffers hold quantised weights
        settings.use_extra_bufts = "AMX_INT8 = 1" not in info
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), settings)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {model}; its log says why")
        ways = WAYS[cache]
        self.contexts = {way: self._new_context(threads, context, way) for way in ways}
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self.model)
        )
        self.ways = {"read": ways[0], "step": ways[0]}
        self._use("read")
        if len(ways) > 1 and context >= TRIAL_TOKENS:
            self._choose_ways()
        return {
            "version": llama_cpp.__version__,
            "system_info": info,
            "extra_buffers": bool(settings.use_extra_bufts),
            "flash_attention": {kind: way.flash for kind, way in self.ways.items()},
            "cache_type": {kind: way.cache for kind, way in self.ways.items()},
        }

    def read(self, ids: Sequence[int]) -> Any:
        self._use("read")
        return self._read(ids)

    def fill(self, context: int) -> None:
        self._use("step")
        self._read(token_ids(min(SEED_TOKENS, context), self.vocab_size))
        if context <= SEED_TOKENS:
            return
        size = self.api.llama_state_seq_get_size(self.context, 0)
        state = (ctypes.c_uint8 * size)()
        self.api.llama_state_seq_get_data(self.context, state, size, 0)
        longer = extended(bytes(state), context)
        if longer is None and context > LONGEST_REAL:
            raise Refusal(f"reading a prompt of {context:,} tokens takes too long")
        if longer is None:
            self._read(token_ids(context, self.vocab_size))
            return
        self.api.llama_memory_clear(self.memory, True)
        data = (ctypes.c_uint8 * len(longer)).from_buffer(longer)
        if not self.api.llama_state_seq_set_data(self.context, data, len(longer), 0):
            raise RuntimeError("llama.cpp does not take the filled cache; its log says why")

    def step(self, token: int, position: int) -> Any:
        self._decode([token])
        return self._row(-1)

    def logits(self, ids: Sequence[int]) -> Any:
        import numpy

        self._use("step")
        self.api.llama_memory_clear(self.memory, True)
        rows = []
        for token in ids:
            self._decode([token])
            rows.append(self._row(-1))
        return numpy.stack(rows)

    def _new_context(self, threads: int, context: int, way: Way) -> Any:
        options = self.api.llama_context_default_params()
        options.n_ctx = context + SPARE_ROWS
        options.n_threads = options.n_threads_batch = threads
        options.type_k = options.type_v = CACHE_TYPES[way.cache]
        options.flash_attn_type = int(way.flash)
        options.no_perf = True
        made = self.api.llama_init_from_model(self.model, options)
        if not made:
            raise RuntimeError(f"llama.cpp cannot make a context of {context} tokens")
        return made

    def _use(self, kind: str) -> None:
        """Turn to the context of this kind of work."""
        self.context = self.contexts[self.ways[kind]]
        self.memory = self.api.llama_get_memory(self.context)
        self.batch = self.api.llama_n_batch(self.context)

    def _choose_ways(self) -> None:
        """The fastest way for each kind of work."""
        ids = token_ids(TRIAL_TOKENS, self.vocab_size)
        works = {"read": lambda: self.read(ids), "step": lambda: self.step(ids[0], TRIAL_TOKENS)}
        for kind, work in works.items():
            times = {}
            for way in self.contexts:
                self.ways[kind] = way
                if kind == "step":
                    self.fill(TRIAL_TOKENS)
                times[way] = min(_timed(work) for _ in range(3))
            self.ways[kind] = min(times, key=lambda way: times[way])

    def _read(self, ids: Sequence[int]) -> Any:
        self.api.llama_memory_clear(self.memory, True)
        for start in range(0, len(ids), self.batch):
            self._decode(ids[start : start + self.batch])
        return self._row(-1)

    def _decode(self, ids: Sequence[int]) -> None:
        tokens = (self.api.llama_token * len(ids))(*ids)
        if self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama.cpp failed to decode; its log says why")

    def _row(self, index: int) -> Any:
        import numpy

        row = self.api.llama_get_logits_ith(self.context, index)
        return numpy.ctypeslib.as_array(row, shape=(self.vocab_size,)).copy()


def _timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def quantize(source: str, target: str, kind: str, threads: int) -> dict[str, Any]:
    """Write the GGUF file `source` as `target` in `kind`, one of FTYPES."""
    import llama_cpp  # pyright: ignore[reportMissingImports]

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = FTYPES[kind], threads
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), options):
        raise RuntimeError(f"llama.cpp cannot quantise {source} to {kind}; its log says why")
    return {}


if __name__ == "__main__":
    serve(steps_of(LlamaCpp()) | {"quantize": quantize})
