"""Hugging Face transformers as a peer: load a causal language model, time its prefill and decode.

The worker uses the fastest of transformers' expert implementations, found by a short trial.
"""

import inspect
import time
from collections.abc import Sequence
from typing import Any

from lowlat.peers.protocol import (
    TimedModel,
    Unsupported,
    available_memory,
    random_token_ids,
    serve_requests,
    timed_handlers,
)

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
EXPERTS = ("grouped_mm", "batched_mm", "eager")
TRIAL_TOKENS = 128
MEMORY_SHARE = 0.4
"""Maximum share of free memory for a filled cache, because every decode step copies it."""


def load_causal_lm(path: str, dtype: Any, **options: Any) -> Any:
    """transformers' model of the folder `path`, from local files only and without remote code.

    Args:
        dtype: a torch dtype.
        options: further arguments of from_pretrained.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        experts_implementation="eager",
        local_files_only=True,
        trust_remote_code=False,
        **options,
    ).eval()


class Transformers(TimedModel):
    """transformers with its own DynamicCache, grown as generate() grows it."""

    def load(
        self, *, model: str, precision: str, cache: str, threads: int, context: int
    ) -> dict[str, Any]:
        import torch
        import transformers

        if precision not in DTYPES:
            raise Unsupported(f"no {precision} weights on CPUs")
        if cache not in DTYPES:
            raise Unsupported(f"no {cache} cache on CPUs")
        torch.set_grad_enabled(False)
        self.torch = torch
        self.model = load_causal_lm(model, getattr(torch, DTYPES[precision]))
        self.vocab_size = self.model.config.vocab_size
        self.new_cache = transformers.DynamicCache
        self.cache = self.new_cache()
        parameters = inspect.signature(self.model.forward).parameters
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"
        self.experts = {"prefill": "eager", "decode": "eager"}
        if precision != "fp32" and context >= TRIAL_TOKENS:
            self._choose_experts()
        return {"version": transformers.__version__, "experts": self.experts}

    def prefill(self, ids: Sequence[int]) -> Any:
        self.model.set_experts_implementation(self.experts["prefill"])
        self.cache = self.new_cache()
        return self._run(ids, keep=1)[0]

    def fill_cache(self, context: int) -> None:
        torch, shapes = self.torch, self._entry_shapes()
        size = sum(shape[1] * shape[3] * dtype.itemsize for pair in shapes for shape, dtype in pair)
        if size * context > MEMORY_SHARE * available_memory():
            needed = size * context / 1e9
            raise Unsupported(f"its cache of {context:,} tokens needs {needed:.1f} GB")
        self.cache = self.new_cache()
        for layer, pair in enumerate(shapes):
            entries = [
                torch.randn(1, heads, 1, width, dtype=dtype).repeat(1, 1, context, 1)
                for (_, heads, _, width), dtype in pair
            ]
            self.cache.update(*entries, layer)

    def decode_step(self, token: int, position: int) -> Any:
        self.model.set_experts_implementation(self.experts["decode"])
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

    def _entry_shapes(self) -> list[Any]:
        """Shapes and dtypes of cached keys and values by layer, taken from one token's entries."""
        self.cache = self.new_cache()
        self._run([0], keep=1)
        layers: Any = self.cache.layers
        return [
            [(tuple(part.shape), part.dtype) for part in (layer.keys, layer.values)]
            for layer in layers
        ]

    def _choose_experts(self) -> None:
        """Select the fastest expert implementation for prefill and for decode."""
        ids = random_token_ids(TRIAL_TOKENS, self.vocab_size)
        trials = {
            "prefill": lambda: self.prefill(ids),
            "decode": lambda: self.decode_step(ids[0], TRIAL_TOKENS),
        }
        for phase, trial in trials.items():
            times: dict[str, float] = {}
            for name in EXPERTS:
                self.experts[phase] = name
                try:
                    trial()
                    start = time.perf_counter()
                    trial()
                    times[name] = time.perf_counter() - start
                except (RuntimeError, ValueError, NotImplementedError):
                    continue  # grouped_mm does not support every shape
            self.experts[phase] = min(times, key=lambda name: times[name])


if __name__ == "__main__":
    serve_requests(timed_handlers(Transformers()))
