"""One decoder layer at work on windows of text, a window at a time.

Owns the layer's weights and the precision: the residual stream and norms are fp32, products with
weights are of a narrower type where the processor multiplies that faster.
"""

from collections.abc import Mapping
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowlat.attention.flash import FlashAttention
from lowlat.config.model import ModelConfig
from lowlat.convert.weights import Weights
from lowlat.model.block import DecoderLayer
from lowlat.ops.rope import RotaryEmbedding


def fast_dtype() -> torch.dtype:
    """bf16 where the CPU's matrix products take it at least as fast as fp32."""
    mkldnn = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if mkldnn else torch.float32


def layer_weights(weights: Weights, number: int) -> dict[str, Tensor]:
    """The tensors of layer `number` by their names in it."""
    prefix = f"layers.{number}."
    with torch.device("meta"):
        names = list(DecoderLayer(weights.config, number, dtype=torch.float32).state_dict())
    found = {name: weights.read(prefix + name) for name in names}
    for name in names:
        weights.release(prefix + name)
    return found


@final
class LayerRun:
    """Decoder layer `number` of `config`, for windows of `length` tokens.

    state: its tensors. dtype: of its products. joins_heads: False leaves out the projection that
    joins the heads (W_O), which `state` need not hold: `attend` returns what goes into it.
    """

    def __init__(
        self,
        config: ModelConfig,
        number: int,
        state: Mapping[str, Tensor],
        length: int,
        dtype: torch.dtype,
        *,
        joins_heads: bool = True,
    ) -> None:
        with torch.device("meta"):
            self._layer = DecoderLayer(config, number, dtype=dtype)
        self._heads = None if joins_heads else _Heads(config.hidden_size)
        if self._heads is not None:
            self._layer.self_attn.o_proj = self._heads  # pyright: ignore[reportAttributeAccessIssue]
        own = {name: _placed(name, state[name], dtype) for name in self._layer.state_dict()}
        self._layer.load_state_dict(own, assign=True)
        self._layer.requires_grad_(False)
        width = config.attention_of(number).rope_dim
        self.rope = RotaryEmbedding(config.rope_of(number), width)(torch.arange(length))
        self._backend = FlashAttention([length])
        self._dtype = dtype

    @property
    def softmax_scale(self) -> float:
        """Factor on scores before their softmax."""
        return self._layer.self_attn.scale

    def normed(self, x: Float[Tensor, "length hidden"]) -> Float[Tensor, "length hidden"]:
        """What the attention reads of the residual stream `x`."""
        return self._layer.input_layernorm(x)

    def attend(self, normed: Float[Tensor, "length hidden"]) -> Float[Tensor, "length out"]:
        """What the attention adds to the residual stream."""
        added = self._layer.self_attn(normed.to(self._dtype), self.rope, self._backend)
        return (added if self._heads is None else self._heads.outputs).float()

    def finish(self, x: Float[Tensor, "length hidden"]) -> Float[Tensor, "length hidden"]:
        """The residual stream behind the layer, from that behind its attention."""
        given = self._layer.post_attention_layernorm(x).to(self._dtype)
        return x + self._layer.mlp(given).float()


class _Heads(nn.Module):
    """In the place of W_O: keeps what the heads put out."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self._hidden_size = hidden_size
        self.outputs = torch.empty(0)

    def forward(self, x: Float[Tensor, "tokens out"]) -> Float[Tensor, "tokens hidden"]:
        self.outputs = x
        return x.new_zeros(len(x), self._hidden_size)


def _placed(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Projections in the type of products, all else (norms, routers, biases) in fp32."""
    return tensor.to(dtype if name.endswith("_proj.weight") else torch.float32)
