"""vLLM's raw logits behind every token of a prompt, as a program of vLLM's own interpreter:

python vllm_logits.py MODEL OUT.json TOKEN,TOKEN,...
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    # Its MLA kernels know DeepSeek's own head sizes alone, in bf16.
    "VLLM_MLA_DISABLE": "1",
}


def main(folder: str, out: str, tokens: str) -> None:
    os.environ |= SETTINGS
    import vllm  # pyright: ignore[reportMissingImports]

    ids = [int(token) for token in tokens.split(",")]
    llm: Any = vllm.LLM(
        model=folder,
        # Its own DeepseekV3 rotates by one base alone and drops biases of the latent.
        model_impl="transformers",
        dtype="float32",
        max_model_len=len(ids) + 1,
        skip_tokenizer_init=True,
        enforce_eager=True,
        logprobs_mode="raw_logits",
        max_logprobs=-1,
    )
    params = vllm.SamplingParams(
        temperature=0, max_tokens=1, prompt_logprobs=-1, logprobs=-1, detokenize=False
    )
    prompt = vllm.TokensPrompt(prompt_token_ids=ids)
    (found,) = llm.generate([prompt], params, use_tqdm=False)
    places = [*found.prompt_logprobs[1:], found.outputs[0].logprobs[0]]
    rows = [[place[token].logprob for token in range(len(place))] for place in places]
    Path(out).write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
