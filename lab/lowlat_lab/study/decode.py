"""Decode time of the trained models at long contexts, rounds interleaved; from the roofline for
variants without native kernels.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowlat import api
from lowlat.config.model import ModelConfig
from lowlat.data.dataset import TokenizedDataset
from lowlat.generate.completion import Completion
from lowlat.generate.model import Model
from lowlat.model.native import supports_native
from lowlat.plan.serving.step_cost import Step, step_cost
from lowlat.plan.serving.weights import dtype_weights
from lowlat.utils.progress import Progress

ROUNDS = 5
NEW_TOKENS = 64
"""Tokens generated in a round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeTime:
    """Time of one decode step of a variant, one sequence, bf16 weights and cache."""

    context: int
    """Tokens in the KV cache at the first step."""
    milliseconds: float
    """Median over rounds."""
    is_measured: bool
    """Measured with the native kernels; else estimated: the time of `reference`, times the ratio of
    the bytes that a step reads.
    """
    rounds: tuple[float, ...] = ()
    """Milliseconds of every round."""


def decode_times(
    models: Mapping[str, Path],
    data: TokenizedDataset,
    *,
    contexts: Sequence[int],
    reference: str,
    progress: Progress,
) -> dict[str, list[DecodeTime]]:
    """Decode times of each model of `models` by variant, for each of `contexts`. Variants without
    native kernels are estimated from the variant `reference`, and left out if that is not measured.
    """
    loaded = {name: api.load(str(path), speculates=False) for name, path in models.items()}
    measured = {name: m for name, m in loaded.items() if supports_native(m.transformer)}
    found: dict[str, list[DecodeTime]] = {name: [] for name in loaded}
    threads = torch.get_num_threads()
    # PyTorch's spinning threads would slow the native kernels' own threads.
    torch.set_num_threads(1)
    try:
        for context in contexts:
            for name, rounds in _rounds(measured, data, context, progress).items():
                middle = statistics.median(rounds)
                time = DecodeTime(
                    context=context, milliseconds=middle, is_measured=True, rounds=tuple(rounds)
                )
                found[name].append(time)
    finally:
        torch.set_num_threads(threads)
    if reference in measured:
        for name in loaded.keys() - measured.keys():
            for known in found[reference]:
                ratio = _step_bytes(loaded[name].config, known.context) / _step_bytes(
                    loaded[reference].config, known.context
                )
                time = known.milliseconds * ratio
                found[name].append(
                    DecodeTime(context=known.context, milliseconds=time, is_measured=False)
                )
    return found


def as_json(times: Mapping[str, Sequence[DecodeTime]]) -> dict[str, list[dict[str, Any]]]:
    """Decode times in a report."""
    return {name: [asdict(time) for time in own] for name, own in times.items()}


def _rounds(
    models: Mapping[str, Model], data: TokenizedDataset, context: int, progress: Progress
) -> dict[str, list[float]]:
    """Milliseconds per token, of every round of each model. The prompt is `context` tokens of
    held-out text, repeated if it is shorter.
    """
    places = np.arange(context) % data.num_tokens("held_out")
    prompt = data.tokens("held_out", places).tolist()
    names, found = list(models), {name: list[float]() for name in models}
    with progress.task(f"decoding at {context:,} tokens", (ROUNDS + 1) * len(names)) as task:
        for number in range(ROUNDS + 1):
            turn = number % max(1, len(names))
            for name in (*names[turn:], *names[:turn]):
                answer = models[name].generate(prompt, max_tokens=NEW_TOKENS, ignore_eos=True)
                assert isinstance(answer, Completion)
                if number > 0:  # the first round fills the prefix cache
                    found[name].append(1000 / answer.usage.decode_tokens_per_second)
                task.advance()
    return found


def _step_bytes(config: ModelConfig, context: int) -> float:
    """Bytes of weights and KV cache that a decode step reads."""
    step = Step(sequences=1, context=context, queries=1)
    cost = step_cost(config, step, dtype_weights(config, "bf16"))
    return cost.weight_bytes + cost.cache_bytes
