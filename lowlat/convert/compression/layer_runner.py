"""Layer-wise forward passes: one decoder layer, or the output head, on windows of text.

The residual stream and norms are fp32. Matrix products use bf16 if the CPU multiplies it faster.
"""

from collections.abc import Mapping
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowlat.attention.flash import FlashAttention
from lowlat.config.model import ModelConfig
from lowlat.convert.parameters.weights import Weights
from lowlat.model.block import DecoderLayer
from lowlat.model.linear import RMSNorm
from lowlat.ops.bf16_products import has_bf16_gemm
from lowlat.ops.rope import RotaryEmbedding


def fast_dtype() -> torch.dtype:
    """bf16 if oneDNN supports bf16 GEMM on this CPU, else fp32."""
    return torch.bfloat16 if has_bf16_gemm() else torch.float32


def layer_weights(weights: Weights, number: int) -> dict[str, Tensor]:
    """The tensors of layer `number`, by their names in the layer."""
    prefix = f"layers.{number}."
    with torch.device("meta"):
        names = list(DecoderLayer(weights.config, number, dtype=torch.float32).state_dict())
    found = {name: weights.read(prefix + name) for name in names}
    for name in names:
        weights.release(prefix + name)
    return found


@final
class LayerRunner:
    """Decoder layer `number` of `config`, for windows of `length` tokens.

    state: its tensors. dtype: of matrix products. has_output: if False, `attend` skips the output
    projection (W_O) and returns its input, the concatenated heads.
    """

    def __init__(
        self,
        config: ModelConfig,
        number: int,
        state: Mapping[str, Tensor],
        length: int,
        dtype: torch.dtype,
        *,
        has_output: bool = True,
    ) -> None:
        with torch.device("meta"):
            self._layer = DecoderLayer(config, number, dtype=dtype)
        self._recorder = None if has_output else _HeadRecorder(config.hidden_size)
        if self._recorder is not None:
            self._layer.self_attn.o_proj = self._recorder  # pyright: ignore[reportAttributeAccessIssue]
        tensors = {name: _cast(name, state[name], dtype) for name in self._layer.state_dict()}
        self._layer.load_state_dict(tensors, assign=True)
        self._layer.requires_grad_(False)
        width = config.attention_of(number).rope_dim
        self.rope = RotaryEmbedding(config.rope_of(number), width)(torch.arange(length))
        self._backend = FlashAttention([length])
        self._dtype = dtype

    @property
    def softmax_scale(self) -> float:
        """Factor on attention scores before the softmax."""
        return self._layer.self_attn.scale

    def normed(self, x: Float[Tensor, "length hidden"]) -> Float[Tensor, "length hidden"]:
        """Input of the attention: the residual stream `x` after its norm."""
        return self._layer.input_layernorm(x)

    def attend(self, normed: Float[Tensor, "length hidden"]) -> Float[Tensor, "length out"]:
        """Output of the attention, which is added to the residual stream."""
        added = self._layer.self_attn(normed.to(self._dtype), self.rope, self._backend)
        return (added if self._recorder is None else self._recorder.outputs).float()

    def finish(self, x: Float[Tensor, "length hidden"]) -> Float[Tensor, "length hidden"]:
        """Run the MLP: the residual stream after the layer, from `x` after its attention."""
        normed = self._layer.post_attention_layernorm(x).to(self._dtype)
        return x + self._layer.mlp(normed).float()


@final
class OutputHead:
    """Final norm and language model head of `base`; matrix products in `dtype`."""

    def __init__(self, base: Weights, dtype: torch.dtype) -> None:
        head = "embed_tokens" if base.config.tie_word_embeddings else "lm_head"
        self._weight, self._dtype = base.read(f"{head}.weight").to(dtype), dtype
        hidden = self._weight.shape[1]
        self._norm = RMSNorm(hidden, base.config.rms_norm_eps, dtype=torch.float32)
        self._norm.weight.data = base.read("norm.weight").float()

    @torch.no_grad()
    def logits(self, x: Float[Tensor, "length hidden"]) -> Float[Tensor, "length vocab"]:
        """Logits of the residual stream `x` after the last layer."""
        return (self._norm(x).to(self._dtype) @ self._weight.T).float()


class _HeadRecorder(nn.Module):
    """Replaces W_O and records its input, the concatenated heads."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self._hidden_size = hidden_size
        self.outputs = torch.empty(0)

    def forward(self, x: Float[Tensor, "tokens out"]) -> Float[Tensor, "tokens hidden"]:
        self.outputs = x
        return x.new_zeros(len(x), self._hidden_size)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Projections in the dtype of matrix products; norms, routers and biases in fp32."""
    return tensor.to(dtype if name.endswith("_proj.weight") else torch.float32)
