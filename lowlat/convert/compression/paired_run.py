"""Layer-wise run of the original and the compressed model on the same text.

Measures the deviation of the compressed model's residual stream. Fits each layer's output
projection (W_O) to the new heads by ridge regression towards the original's residual stream after
its attention, which also corrects the drift of earlier layers.
"""

from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int
from torch import Tensor

from lowlat.config.model import ModelConfig
from lowlat.convert.compression.layer_runner import LayerRunner, OutputHead, layer_weights
from lowlat.convert.parameters.weights import Weights

HEAD_ROWS = 512
"""Tokens whose logits are in memory at a time."""
OUTPUT = "o_proj.weight"
RIDGE = 0.1
"""Penalty on changes of W_O, relative to the mean square of its inputs. A smaller penalty overfits
the calibration text.
"""


@final
class OutputRegression:
    """Sums over tokens for the ridge regression of one layer's W_O. Tokens are weighted by the
    inverse square of their residual stream, as the following norm does.
    """

    def __init__(self, weight: Float[Tensor, "hidden heads_out"], bias: Tensor | None) -> None:
        self._weight, self._bias = weight.double(), bias
        hidden, width = weight.shape
        self._moments = torch.zeros(width, width, dtype=torch.float64)
        self._products = torch.zeros(width, hidden, dtype=torch.float64)

    def add(
        self,
        heads: Float[Tensor, "length heads_out"],
        before: Float[Tensor, "length hidden"],
        target: Float[Tensor, "length hidden"],
    ) -> None:
        """Add a window of text: the input of W_O, the compressed model's residual stream before the
        attention, and the original's after it.
        """
        missing = target - before
        if self._bias is not None:
            missing = missing - self._bias
        token_weights = target.square().sum(1, keepdim=True).clamp(min=1e-30).reciprocal()
        weighted = heads * token_weights
        self._moments += weighted.T @ heads
        self._products += weighted.T @ missing

    def solution(self) -> Float64[Tensor, "hidden heads_out"]:
        """The new W_O."""
        ridge = RIDGE * self._moments.diagonal().mean().clamp(min=1e-30)
        regularised = self._moments + ridge * torch.eye(len(self._moments), dtype=torch.float64)
        return torch.linalg.solve(
            regularised, self._products + ridge * self._weight.T
        ).T.contiguous()


@final
class PairedRun:
    """`base`, and the same model with the attention of `config`.

    fit_windows: text to fit W_O on; without any, W_O is not changed. held_out: text for deviation
    and loss. dtype: of matrix products.
    """

    def __init__(
        self,
        base: Weights,
        config: ModelConfig,
        fit_windows: Int[Tensor, "windows length"],
        held_out: Int[Tensor, "held_out length"],
        dtype: torch.dtype,
    ) -> None:
        self._base, self._config, self._dtype = base, config, dtype
        self._num_fit, self._held_out = len(fit_windows), held_out
        embedded = base.read("embed_tokens.weight")[torch.cat([fit_windows, held_out])].float()
        self._original, self._compressed = list(embedded), list(embedded)

    @torch.no_grad()
    def advance(self, number: int, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], float]:
        """Run layer `number` in both models, with the attention `tensors` in the compressed one.

        Returns the tensors, including W_O if it was fitted, and the mean squared deviation of the
        residual stream after the layer, relative to its square token by token.
        """
        state = layer_weights(self._base, number)
        length = self._held_out.shape[1]
        original = LayerRunner(self._base.config, number, state, length, self._dtype)
        kept = {n: t for n, t in state.items() if not n.startswith("self_attn.")}
        changed = kept | {f"self_attn.{name}": tensor for name, tensor in tensors.items()}
        compressed = LayerRunner(
            self._config, number, changed, length, self._dtype, has_output=False
        )
        weight, bias = state["self_attn." + OUTPUT], state.get("self_attn.o_proj.bias")
        regression, heads = OutputRegression(weight, bias), list[Tensor]()
        for window, (own, other) in enumerate(zip(self._original, self._compressed, strict=True)):
            middle = own + original.attend(original.normed(own))
            heads.append(compressed.attend(compressed.normed(other)))
            if window < self._num_fit:
                regression.add(heads[-1], other, middle)
            self._original[window] = original.finish(middle)
        if self._num_fit:
            weight = regression.solution()
            tensors = tensors | {OUTPUT: weight}
        output = weight.to(self._dtype)
        for window, (given, other) in enumerate(zip(heads, self._compressed, strict=True)):
            added = F.linear(given.to(self._dtype), output).float()
            added = added if bias is None else added + bias.float()
            self._compressed[window] = compressed.finish(other + added)
        return tensors, self._deviation()

    def perplexities(self) -> tuple[float, float]:
        """Held-out perplexities of the original and the compressed model, after all layers."""
        head = OutputHead(self._base, self._dtype)
        original, compressed = (
            self._perplexity(streams[self._num_fit :], head)
            for streams in (self._original, self._compressed)
        )
        return original, compressed

    def _deviation(self) -> float:
        """Relative deviation, averaged over tokens: attention sinks are huge and hardly deviate."""
        found: list[Tensor] = []
        for original, compressed in zip(
            self._original[self._num_fit :], self._compressed[self._num_fit :], strict=True
        ):
            sizes = original.square().sum(1).clamp(min=1e-30)
            found.append((compressed - original).square().sum(1) / sizes)
        return float(torch.cat(found).double().mean())

    @torch.no_grad()
    def _perplexity(
        self, streams: Sequence[Float[Tensor, "length hidden"]], head: OutputHead
    ) -> float:
        total = 0.0
        for x, ids in zip(streams, self._held_out, strict=True):
            for rows, targets in zip(
                x[:-1].split(HEAD_ROWS), ids[1:].split(HEAD_ROWS), strict=True
            ):
                logits = head.logits(rows)
                total += float(F.cross_entropy(logits, targets, reduction="sum"))
        mean = torch.tensor(total / self._held_out[:, 1:].numel(), dtype=torch.float64)
        return float(mean.exp())
