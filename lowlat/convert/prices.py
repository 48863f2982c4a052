"""What an error of each layer's attention costs at the end of the model.

The same error relative to the residual stream is forgotten by some layers and made much of by
others. So each layer is compressed alone, and how far the next-token distributions then diverge
from the original's is measured; layers pass by one after the other, each is in memory once.
"""

import statistics
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lowlat.config.model import ModelConfig
from lowlat.convert.budget import Costs, Price, Widths
from lowlat.convert.layer_run import LayerRun, layer_weights
from lowlat.convert.sides import Ending
from lowlat.convert.weights import Weights
from lowlat.utils.progress import Task

WINDOWS, LENGTH = 8, 256
"""Of text, and tokens of each: of many kinds of text, as two kinds have prices of their own."""
PRECISION = torch.float32
"""Of products with weights: what rounding to bf16 does after a change diverges by 1e-3 nats of
itself, as much as a layer that keeps half of its cache.
"""
EVERY = 2
"""Of so many tokens one is looked at: the head is much of the work in small models."""
HEAD_ROWS = 256
"""Tokens whose logits are in memory at a time."""
MOST = 16.0
"""How far prices may lie from their median: what a layer loses may be too little to measure."""
TRUST = 0.25
"""Power of a price over the median: on text of another kind it would be another."""
LEAST = 0.1
"""Share of a layer's divergence that its latent has at least: the two parts do not add up."""


def priced_on(windows: Int[Tensor, "windows length"]) -> Int[Tensor, "few short"]:
    """Beginnings of some of the calibration's windows, evenly spread."""
    return windows[:: -(-len(windows) // WINDOWS), :LENGTH]


@torch.no_grad()
def lone_divergences(
    base: Weights,
    config: ModelConfig,
    tensors: Callable[[int], dict[str, Tensor]],
    windows: Int[Tensor, "windows length"],
    task: Task,
) -> list[float]:
    """For every layer the Kullback-Leibler divergence of next-token distributions, in nats per
    token, of `base` with that layer's attention alone replaced: of `config`, with `tensors` of its
    number. In memory are a residual stream for every layer, and one layer.
    """
    length, dtype = windows.shape[1], PRECISION
    original = list(base.read("embed_tokens.weight")[windows].float())
    changed: list[list[Float[Tensor, "length hidden"]]] = []
    for number in range(base.config.num_hidden_layers):
        state = layer_weights(base, number)
        layer = LayerRun(base.config, number, state, length, dtype)
        new = {f"self_attn.{name}": tensor for name, tensor in tensors(number).items()}
        compressed = LayerRun(config, number, state | new, length, dtype)
        for streams in changed:
            for window, x in enumerate(streams):
                streams[window] = layer.finish(x + layer.attend(layer.normed(x)))
        own: list[Tensor] = []
        for window, x in enumerate(original):
            normed = layer.normed(x)
            own.append(compressed.finish(x + compressed.attend(normed)))
            original[window] = layer.finish(x + layer.attend(normed))
        changed.append(own)
        task.advance(1)
    ending, sums = Ending(base, dtype), torch.zeros(len(changed), dtype=torch.float64)
    for window, whole in enumerate(original):
        for start in range(0, length, EVERY * HEAD_ROWS):
            rows = slice(start, start + EVERY * HEAD_ROWS, EVERY)
            expected = F.log_softmax(ending.logits(whole[rows]), dim=-1)
            for number, streams in enumerate(changed):
                found = F.log_softmax(ending.logits(streams[window][rows]), dim=-1)
                total = F.kl_div(found, expected, reduction="sum", log_target=True)
                sums[number] += total.double()
    return (sums / windows[:, ::EVERY].numel()).tolist()


def layer_prices(
    costs: Sequence[Costs],
    widths: Sequence[Widths],
    alone: Sequence[float],
    still: Sequence[float],
) -> list[Price]:
    """What units of the layers' costs, predicted for `widths`, are worth in nats per token.

    alone: divergences with one layer compressed; still: the same with all of its latent kept, so
    that only components stand still which used to turn.
    """
    latent = [max(both - one, LEAST * both) for both, one in zip(alone, still, strict=True)]
    dropped = [own.dropped(each.latent) for own, each in zip(costs, widths, strict=True)]
    by_part = (_worth(still, [own.still for own in costs]), _worth(latent, dropped))
    return [Price(still=one, latent=other) for one, other in zip(*by_part, strict=True)]


def trusted(prices: Sequence[Price]) -> list[Price]:
    """Prices to divide a budget by: those measured, drawn to their median."""
    still, latent = _drawn([p.still for p in prices]), _drawn([p.latent for p in prices])
    return [Price(still=one, latent=other) for one, other in zip(still, latent, strict=True)]


def _drawn(values: Sequence[float]) -> list[float]:
    median = statistics.median(values)
    return [median ** (1 - TRUST) * value**TRUST for value in values]


def _worth(divergences: Sequence[float], costs: Sequence[float]) -> list[float]:
    """Ratios within MOST of their median, which stands where a cost is nothing."""
    found = torch.tensor(divergences, dtype=torch.float64) / torch.tensor(costs).double()
    usable = found[found.isfinite() & (found > 0)]
    if not len(usable):
        return [1.0] * len(costs)
    median = usable.median()
    found = torch.where(found.isfinite(), found, median)
    return found.clamp(median / MOST, median * MOST).tolist()
