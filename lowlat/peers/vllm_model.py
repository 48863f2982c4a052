"""vLLM on the CPU as a peer, through its offline LLM class.

vLLM exposes no single decode steps. A step is timed as the difference between completions of one
token and of several, for a prompt that its prefix cache already holds.
"""

import os
import time
from collections.abc import Sequence
from typing import Any

from lowlat.peers.protocol import (
    Unsupported,
    peak_memory,
    random_token_ids,
    reset_peak_memory,
    serve_requests,
)

LONGEST = 8192
"""Longest context; longer ones would need a prefill of many minutes first."""
SPARE_TOKENS = 128
CACHE_GB = "4"
TOP_LOGPROBS = 5
SETTINGS = {
    # a single process, so that the worker can be suspended and resumed
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": CACHE_GB,
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


class VLLM:
    """One vllm.LLM with its prefix cache."""

    def load(
        self, *, model: str, precision: str, cache: str, threads: int, context: int
    ) -> dict[str, Any]:
        if precision != "bf16":
            raise Unsupported(f"no {precision} experts on CPUs")
        if cache != "bf16":
            raise Unsupported(f"no {cache} cache on CPUs")
        os.environ |= SETTINGS | {"OMP_NUM_THREADS": str(threads)}
        import vllm  # pyright: ignore[reportMissingImports]

        self.api: Any = vllm
        self.longest = min(context, LONGEST)
        self.llm: Any = vllm.LLM(
            model=model,
            dtype="bfloat16",
            max_model_len=self.longest + SPARE_TOKENS,
            skip_tokenizer_init=True,
            enable_prefix_caching=True,
            seed=0,
        )
        self.vocab_size = self.llm.model_config.get_vocab_size()
        return {"version": vllm.__version__}

    def prefill(self, tokens: int) -> dict[str, Any]:
        self._check_length(tokens)
        self.llm.reset_prefix_cache()
        before = reset_peak_memory()
        seconds, _ = self._complete(random_token_ids(tokens, self.vocab_size), 1)
        return {"seconds": seconds, "peak_bytes": peak_memory(), "before_bytes": before}

    def decode(self, context: int, steps: int, seconds: float) -> dict[str, Any]:
        self._check_length(context)
        ids = random_token_ids(context, self.vocab_size)
        self._complete(ids, 1)
        base, _ = self._complete(ids, 1)
        once, _ = self._complete(ids, 3)
        step = max((once - base) / 2, 1e-6)
        count = max(2, min(steps, int(seconds / step)))
        total, _ = self._complete(ids, 1 + count)
        return {"step_seconds": [(total - base) / count] * count}

    def first_token(self, ids: list[int]) -> dict[str, Any]:
        _, found = self._complete(ids, 1)
        return {"token": found.token_ids[0]}

    def top_logprobs(self, ids: list[int]) -> dict[str, Any]:
        """Log-probabilities of the most likely tokens after `ids`, by token id."""
        _, found = self._complete(ids, 1, logprobs=TOP_LOGPROBS)
        return {"logprobs": {str(k): v.logprob for k, v in found.logprobs[0].items()}}

    def _check_length(self, tokens: int) -> None:
        if tokens > self.longest:
            raise Unsupported(f"the prefill of {tokens:,} tokens takes too long")

    def _complete(self, ids: Sequence[int], tokens: int, **options: Any) -> tuple[float, Any]:
        """Seconds of, and result of, a completion of exactly `tokens` greedy tokens."""
        params = self.api.SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, **options
        )
        prompt = self.api.TokensPrompt(prompt_token_ids=list(ids))
        start = time.perf_counter()
        (found,) = self.llm.generate([prompt], params, use_tqdm=False)
        return time.perf_counter() - start, found.outputs[0]


if __name__ == "__main__":
    program = VLLM()
    serve_requests(
        {
            "load": program.load,
            "prefill": program.prefill,
            "decode": program.decode,
            "first_token": program.first_token,
            "top_logprobs": program.top_logprobs,
        }
    )
