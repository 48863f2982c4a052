"""Layer sensitivities: KL divergence of the model's predictions per error of a layer's attention.

The same error relative to the residual stream has more effect in some layers than in others. Each
layer is compressed alone, and the divergence of the next-token distributions from the original
model's is measured. Memory holds one layer at a time.
"""

import statistics
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lowlat.config.model import ModelConfig
from lowlat.convert.compression.budget import EntryWidths, PredictedError, Sensitivity
from lowlat.convert.compression.layer_runner import LayerRunner, OutputHead, layer_weights
from lowlat.convert.parameters.weights import Weights
from lowlat.utils.progress import Task

WINDOWS, LENGTH = 8, 256
"""Number of text windows, and tokens of each: many, as sensitivities depend on the kind of text."""
PRECISION = torch.float32
"""Dtype of matrix products. Rounding to bf16 after a change adds a divergence of 1e-3 nats, as much
as a layer that keeps half of its cache.
"""
EVERY = 2
"""One of this many tokens is evaluated, because the LM head is expensive in small models."""
HEAD_ROWS = 256
"""Tokens whose logits are in memory at a time."""
MAX_RATIO = 16.0
"""Largest ratio of a sensitivity to the median, or of the median to it: a layer's loss may be too
small to measure.
"""
SHRINKAGE = 0.25
"""Exponent of a sensitivity relative to the median, because sensitivities depend on the text."""
LEAST_LATENT = 0.1
"""Minimum share of a layer's divergence to attribute to its latent, because the divergences of the
two parts do not add up.
"""


def sensitivity_windows(windows: Int[Tensor, "windows length"]) -> Int[Tensor, "few short"]:
    """The beginnings of WINDOWS of the calibration windows, evenly spread."""
    return windows[:: -(-len(windows) // WINDOWS), :LENGTH]


@torch.no_grad()
def single_layer_divergences(
    base: Weights,
    config: ModelConfig,
    tensors: Callable[[int], dict[str, Tensor]],
    windows: Int[Tensor, "windows length"],
    task: Task,
) -> list[float]:
    """For each layer, the Kullback-Leibler divergence of the next-token distributions of `base` if
    that layer alone gets new attention, in nats per token.

    config, tensors: the compressed model and, by layer number, the tensors of its attention. Memory
    holds one layer, and one residual stream per layer.
    """
    length, dtype = windows.shape[1], PRECISION
    original = list(base.read("embed_tokens.weight")[windows].float())
    changed: list[list[Float[Tensor, "length hidden"]]] = []
    for number in range(base.config.num_hidden_layers):
        state = layer_weights(base, number)
        layer = LayerRunner(base.config, number, state, length, dtype)
        new = {f"self_attn.{name}": tensor for name, tensor in tensors(number).items()}
        compressed = LayerRunner(config, number, state | new, length, dtype)
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
    head, sums = OutputHead(base, dtype), torch.zeros(len(changed), dtype=torch.float64)
    for window, stream in enumerate(original):
        for start in range(0, length, EVERY * HEAD_ROWS):
            rows = slice(start, start + EVERY * HEAD_ROWS, EVERY)
            expected = F.log_softmax(head.logits(stream[rows]), dim=-1)
            for number, streams in enumerate(changed):
                found = F.log_softmax(head.logits(streams[window][rows]), dim=-1)
                total = F.kl_div(found, expected, reduction="sum", log_target=True)
                sums[number] += total.double()
    return (sums / windows[:, ::EVERY].numel()).tolist()


def layer_sensitivities(
    errors: Sequence[PredictedError],
    widths: Sequence[EntryWidths],
    both: Sequence[float],
    nope: Sequence[float],
) -> list[Sensitivity]:
    """Divergence per unit of the layers' predicted errors, in nats per token.

    both: divergences with one layer compressed to `widths`. nope: divergences with an untruncated
    latent, where only the rotation is lost.
    """
    latent = [max(all_ - one, LEAST_LATENT * all_) for all_, one in zip(both, nope, strict=True)]
    truncation = [own.truncation(each.latent) for own, each in zip(errors, widths, strict=True)]
    by_part = (_ratios(nope, [own.nope for own in errors]), _ratios(latent, truncation))
    return [Sensitivity(nope=one, latent=other) for one, other in zip(*by_part, strict=True)]


def shrunk(sensitivities: Sequence[Sensitivity]) -> list[Sensitivity]:
    """Sensitivities shrunk towards their median, to allocate a budget by."""
    nope = _shrunk([each.nope for each in sensitivities])
    latent = _shrunk([each.latent for each in sensitivities])
    return [Sensitivity(nope=one, latent=other) for one, other in zip(nope, latent, strict=True)]


def _shrunk(values: Sequence[float]) -> list[float]:
    median = statistics.median(values)
    return [median ** (1 - SHRINKAGE) * value**SHRINKAGE for value in values]


def _ratios(divergences: Sequence[float], errors: Sequence[float]) -> list[float]:
    """Divergence over error, clamped to MAX_RATIO of the median; the median for an error of 0."""
    found = torch.tensor(divergences, dtype=torch.float64) / torch.tensor(errors).double()
    usable = found[found.isfinite() & (found > 0)]
    if not len(usable):
        return [1.0] * len(errors)
    median = usable.median()
    found = torch.where(found.isfinite(), found, median)
    return found.clamp(median / MAX_RATIO, median * MAX_RATIO).tolist()
