"""Decoding speed of the trained models at a long context, rounds interleaved."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from lowlat import api
from lowlat.data.dataset import TokenizedDataset
from lowlat.generate.completion import Completion
from lowlat.generate.model import Model
from lowlat.model.native import supports_native
from lowlat.utils.progress import Progress

ROUNDS = 5
NEW_TOKENS = 64
"""Tokens generated in a round."""


@dataclass(kw_only=True, slots=True)
class Speed:
    """Decode throughput of one variant."""

    context: int
    """Tokens in the KV cache at the first step."""
    is_native: bool
    """Whether the native kernels ran it, instead of PyTorch."""
    rounds: list[float] = field(default_factory=list)
    """Tokens per second of every round."""

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def ratio(self, other: "Speed") -> float:
        """This speed over another: the median of the ratios of each round."""
        pairs = zip(self.rounds, other.rounds, strict=True)
        return statistics.median(own / theirs for own, theirs in pairs)


def decode_speeds(
    models: Mapping[str, Path], data: TokenizedDataset, *, context: int, progress: Progress
) -> dict[str, Speed]:
    """Tokens per second of each model of `models`, bf16 weights and cache, by variant.

    The prompt is `context` tokens of held-out text, repeated if it is shorter.
    """
    threads = torch.get_num_threads()
    places = np.arange(context) % data.num_tokens("held_out")
    prompt = data.tokens("held_out", places).tolist()
    loaded = {name: api.load(str(path), speculates=False) for name, path in models.items()}
    speeds = {
        name: Speed(context=context, is_native=supports_native(model.transformer))
        for name, model in loaded.items()
    }
    names = list(loaded)
    try:
        with progress.task("decoding", (ROUNDS + 1) * len(names)) as task:
            for number in range(ROUNDS + 1):
                turn = number % len(names)
                for name in (*names[turn:], *names[:turn]):
                    # PyTorch's spinning threads would slow the native kernels' own threads.
                    torch.set_num_threads(1 if speeds[name].is_native else threads)
                    rate = _rate(loaded[name], prompt)
                    if number > 0:  # the first round fills the prefix cache
                        speeds[name].rounds.append(rate)
                    task.advance()
    finally:
        torch.set_num_threads(threads)
    return speeds


def _rate(model: Model, prompt: Sequence[int]) -> float:
    answer = model.generate(prompt, max_tokens=NEW_TOKENS, ignore_eos=True)
    assert isinstance(answer, Completion)
    return answer.usage.decode_tokens_per_second
