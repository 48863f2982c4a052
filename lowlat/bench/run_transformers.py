"""Worker: transformers on torch, with the fastest of its implementations of experts."""

import inspect
import time
from collections.abc import Sequence
from typing import Any

from lowlat.bench.protocol import (
    Refusal,
    Stepper,
    available_memory,
    serve,
    steps_of,
    token_ids,
)

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
EXPERTS = ("grouped_mm", "batched_mm", "eager")
TRIAL_TOKENS = 128
MEMORY_SHARE = 0.4
"""Most of the free memory a filled cache may take: a step of the growing cache copies it."""


class Transformers(Stepper):
    """transformers' own cache, grown as generate() grows it."""

    def load(
        self, *, model: str, precision: str, cache: str, threads: int, context: int
    ) -> dict[str, Any]:
        import torch
        import transformers

        if precision not in DTYPES:
            raise Refusal(f"no {precision} weights on CPUs")
        if cache not in DTYPES:
            raise Refusal(f"no {cache} cache on CPUs")
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        transformers.logging.set_verbosity_error()
        self.torch = torch
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            model,
            dtype=getattr(torch, DTYPES[precision]),
            local_files_only=True,
            trust_remote_code=False,
            experts_implementation="eager",
        ).eval()
        self.vocab_size = self.model.config.vocab_size
        self.new_cache = transformers.DynamicCache
        self.cache = self.new_cache()
        takes = inspect.signature(self.model.forward).parameters
        self.cache_name = "cache" if "cache" in takes else "past_key_values"
        self.experts = {"read": "eager", "step": "eager"}
        if precision != "fp32" and context >= TRIAL_TOKENS:
            self._choose_experts()
        return {"version": transformers.__version__, "experts": self.experts}

    def read(self, ids: Sequence[int]) -> Any:
        self.model.set_experts_implementation(self.experts["read"])
        self.cache = self.new_cache()
        return self._run(ids, keep=1)[0]

    def fill(self, context: int) -> None:
        torch, shapes = self.torch, self._row_shapes()
        size = sum(shape[1] * shape[3] * dtype.itemsize for pair in shapes for shape, dtype in pair)
        if size * context > MEMORY_SHARE * available_memory():
            raise Refusal(f"its cache of {context:,} tokens needs {size * context / 1e9:.1f} GB")
        self.cache = self.new_cache()
        for layer, pair in enumerate(shapes):
            rows = [
                torch.randn(1, heads, 1, width, dtype=dtype).repeat(1, 1, context, 1)
                for (_, heads, _, width), dtype in pair
            ]
            self.cache.update(*rows, layer)

    def step(self, token: int, position: int) -> Any:
        self.model.set_experts_implementation(self.experts["step"])
        return self._run([token], keep=1)[0]

    def logits(self, ids: Sequence[int]) -> Any:
        self.cache = self.new_cache()
        return self._run(ids, keep=0)

    def _run(self, ids: Sequence[int], *, keep: int) -> Any:
        found = self.model(
            input_ids=self.torch.tensor([list(ids)]),
            use_cache=True,
            logits_to_keep=keep,
            **{self.cache_name: self.cache},
        )
        return found.logits[0].float().numpy()

    def _row_shapes(self) -> list[Any]:
        """Per layer the shapes and dtypes of what is cached, learnt from one token."""
        self.cache = self.new_cache()
        self._run([0], keep=1)
        layers: Any = self.cache.layers
        return [
            [(tuple(part.shape), part.dtype) for part in (layer.keys, layer.values)]
            for layer in layers
        ]

    def _choose_experts(self) -> None:
        """Time each implementation on both kinds of work; what does not run is out."""
        ids = token_ids(TRIAL_TOKENS, self.vocab_size)
        works = {"read": lambda: self.read(ids), "step": lambda: self.step(ids[0], TRIAL_TOKENS)}
        for kind, work in works.items():
            times: dict[str, float] = {}
            for name in EXPERTS:
                self.experts[kind] = name
                try:
                    work()
                    start = time.perf_counter()
                    work()
                    times[name] = time.perf_counter() - start
                except (RuntimeError, ValueError, NotImplementedError):
                    continue  # grouped_mm does not take every shape
            self.experts[kind] = min(times, key=lambda name: times[name])


if __name__ == "__main__":
    serve(steps_of(Transformers()))
