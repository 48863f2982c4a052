"""A model before and after its compression, run side by side on the same text, layer by layer.

Owns both residual streams, where W_O is fitted again in between, and what the change costs.
"""

from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lowlat.config.model import ModelConfig
from lowlat.convert.layer_run import LayerRun, layer_weights
from lowlat.convert.refit import Refit
from lowlat.convert.weights import Weights
from lowlat.model.linear import RMSNorm

HEAD_ROWS = 512
"""Tokens whose logits are in memory at a time."""
OUTPUT = "o_proj.weight"


@final
class Sides:
    """`base` and the same model with the attention of `config`.

    fitted: windows to fit W_O on; without any it stays as it is. held_out: windows that deviation
    and loss are measured on. dtype: of products with weights.
    """

    def __init__(
        self,
        base: Weights,
        config: ModelConfig,
        fitted: Int[Tensor, "windows length"],
        held_out: Int[Tensor, "held_out length"],
        dtype: torch.dtype,
    ) -> None:
        self._base, self._config, self._dtype = base, config, dtype
        self._fits, self._held_out = len(fitted), held_out
        embedded = base.read("embed_tokens.weight")[torch.cat([fitted, held_out])].float()
        self._before, self._after = list(embedded), list(embedded)

    @torch.no_grad()
    def advance(self, number: int, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], float]:
        """Run layer `number`, its attention replaced by `tensors` on one side.

        Returns the tensors, W_O among them where it was fitted, and the mean squared deviation of
        the residual stream behind the layer, relative to its square token by token.
        """
        state = layer_weights(self._base, number)
        length = self._held_out.shape[1]
        original = LayerRun(self._base.config, number, state, length, self._dtype)
        kept = {n: t for n, t in state.items() if not n.startswith("self_attn.")}
        changed = kept | {f"self_attn.{name}": tensor for name, tensor in tensors.items()}
        heads = LayerRun(self._config, number, changed, length, self._dtype, joins_heads=False)
        weight, bias = state["self_attn." + OUTPUT], state.get("self_attn.o_proj.bias")
        refit, outputs = Refit(weight, bias), list[Tensor]()
        for window, (before, after) in enumerate(zip(self._before, self._after, strict=True)):
            middle = before + original.attend(original.normed(before))
            outputs.append(heads.attend(heads.normed(after)))
            if window < self._fits:
                refit.add(outputs[-1], after, middle)
            self._before[window] = original.finish(middle)
        if self._fits:
            weight = refit.solution()
            tensors = tensors | {OUTPUT: weight}
        joined = weight.to(self._dtype)
        for window, (given, after) in enumerate(zip(outputs, self._after, strict=True)):
            added = F.linear(given.to(self._dtype), joined).float()
            added = added if bias is None else added + bias.float()
            self._after[window] = heads.finish(after + added)
        return tensors, self._deviation()

    def losses(self) -> tuple[float, float]:
        """Perplexities of the held-out windows before and after."""
        ending = Ending(self._base, self._dtype)
        before, after = (
            self._perplexity(side[self._fits :], ending) for side in (self._before, self._after)
        )
        return before, after

    def _deviation(self) -> float:
        """Every token counts alike: the sinks of attention are huge, and hardly deviate."""
        found: list[Tensor] = []
        for before, after in zip(
            self._before[self._fits :], self._after[self._fits :], strict=True
        ):
            sizes = before.square().sum(1).clamp(min=1e-30)
            found.append((after - before).square().sum(1) / sizes)
        return float(torch.cat(found).double().mean())

    @torch.no_grad()
    def _perplexity(
        self, streams: Sequence[Float[Tensor, "length hidden"]], ending: "Ending"
    ) -> float:
        total = 0.0
        for x, ids in zip(streams, self._held_out, strict=True):
            for rows, targets in zip(
                x[:-1].split(HEAD_ROWS), ids[1:].split(HEAD_ROWS), strict=True
            ):
                logits = ending.logits(rows)
                total += float(F.cross_entropy(logits, targets, reduction="sum"))
        mean = torch.tensor(total / self._held_out[:, 1:].numel(), dtype=torch.float64)
        return float(mean.exp())


@final
class Ending:
    """Last norm and head of `base`; products in `dtype`."""

    def __init__(self, base: Weights, dtype: torch.dtype) -> None:
        head = "embed_tokens" if base.config.tie_word_embeddings else "lm_head"
        self._weight, self._dtype = base.read(f"{head}.weight").to(dtype), dtype
        hidden = self._weight.shape[1]
        self._norm = RMSNorm(hidden, base.config.rms_norm_eps, dtype=torch.float32)
        self._norm.weight.data = base.read("norm.weight").float()

    @torch.no_grad()
    def logits(self, x: Float[Tensor, "length hidden"]) -> Float[Tensor, "length vocab"]:
        """Of the residual stream `x` behind the last layer."""
        return (self._norm(x).to(self._dtype) @ self._weight.T).float()
