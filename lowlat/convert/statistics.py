"""What compression needs to know of a layer's attention, measured on calibration text.

Layers are run one after the other, so that one layer's weights and statistics are in memory at a
time. Owns the measuring; what follows from it is `convert.components`'s and `convert.factors`'s.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Complex128, Float, Float64, Int
from torch import Tensor

from lowlat.attention.flash import FlashAttention
from lowlat.config.model import GQAConfig
from lowlat.convert.weights import Weights
from lowlat.model.block import DecoderLayer
from lowlat.model.gqa import GQA
from lowlat.ops.rope import RotaryTables, apply_rope, inverse_frequencies, rotation_magnitude
from lowlat.utils.progress import Task

ATTENTION_WINDOWS = 8
"""Windows whose attention is looked at; the inputs' covariance comes from all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionWeights:
    """One layer's projections in fp64, inputs extended by a constant 1 that carries the biases."""

    q: Float64[Tensor, "heads head_dim inputs"]
    k: Float64[Tensor, "groups head_dim inputs"]
    v: Float64[Tensor, "groups head_dim inputs"]
    o: Float64[Tensor, "heads hidden head_dim"]
    """Output of each head's values."""
    frequencies: Float64[Tensor, " pairs"]
    """Radians per position of the pairs of channels (i, i + head_dim / 2)."""
    magnitude: float
    """Factor on rotated queries and keys (YaRN and longrope)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerStatistics:
    """Averages over tokens. Sensitivity of a query n to a key m is a_nm |W_O (v_m - o_n)|^2: the
    squared movement of the head's output when the score moves by one.
    """

    covariance: Float64[Tensor, "inputs inputs"]
    """E[x x^T] of the extended, normalised inputs."""
    attended: Float64[Tensor, "inputs inputs"]
    """The same with each token weighted by the attention it receives."""
    queries: Float64[Tensor, "heads head_dim head_dim"]
    """E[q q^T] before rotation, weighted by sensitivity."""
    sensitivity: Float64[Tensor, " heads"]
    """Per query, summed over its keys."""
    rotation: Complex128[Tensor, "heads pairs"]
    """exp(i w (n - m)), averaged under attention."""
    norms: Float64[Tensor, "heads pairs"]
    """E |q_l| E |k_l| of every pair of channels (MHA2MLA's measure)."""
    residual: float
    """E |h|^2 of the residual stream after the attention: what a change is to be compared with."""

    @property
    def inputs(self) -> Float64[Tensor, "inputs inputs"]:
        """The covariance that errors are weighed by: tokens as they are and as they are attended
        to, half and half.
        """
        return (self.covariance + self.attended) / 2


def read_attention(weights: Weights, number: int) -> AttentionWeights:
    """The projections of layer `number` of a GQA model."""
    dims, rope = weights.config.attention_of(number), weights.config.rope_of(number)
    assert isinstance(dims, GQAConfig)
    order = torch.arange(dims.head_dim)
    if rope.rope_interleave:
        order = order.view(-1, 2).T.flatten()

    def heads(name: str) -> Tensor:
        prefix = f"layers.{number}.self_attn.{name}."
        whole = weights.read(prefix + "weight").double()
        if dims.qkv_bias:
            bias = weights.read(prefix + "bias").double()
            whole = torch.cat([whole, bias[:, None]], dim=1)
        return whole.unflatten(0, (-1, dims.head_dim))

    output = weights.read(f"layers.{number}.self_attn.o_proj.weight").double()
    return AttentionWeights(
        q=heads("q_proj")[:, order],
        k=heads("k_proj")[:, order],
        v=heads("v_proj"),
        o=output.unflatten(1, (-1, dims.head_dim)).transpose(0, 1),
        frequencies=inverse_frequencies(rope, dims.head_dim).double(),
        magnitude=rotation_magnitude(rope),
    )


def run_layers(
    weights: Weights, windows: Int[Tensor, "windows length"], task: Task
) -> Iterator[LayerStatistics]:
    """Statistics of each decoder layer of a GQA model, in order, computed in fp32 on the CPU."""
    config = weights.config
    count, length = windows.shape
    x = weights.read("embed_tokens.weight")[windows.flatten()].float()
    weights.release("embed_tokens.weight")
    positions = torch.arange(length).repeat(count)
    for number in range(config.num_hidden_layers):
        own = read_attention(weights, number)
        layer = filled_layer(weights, number)
        width = config.attention_of(number).rope_dim
        rope = RotaryTables(config.rope_of(number), width)(positions)
        with torch.no_grad():
            normed = layer.input_layernorm(x)
            gathered = _gathered(layer, own, normed.unflatten(0, (count, length)), rope)
            x = x + layer.self_attn(normed, rope, FlashAttention([length] * count))
            residual = x.double().square().sum(-1)
            # The first tokens of a window may be huge in every model: they are no measure.
            residual = float(residual.unflatten(0, (count, length))[:, length // 8 :].mean())
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        yield LayerStatistics(**gathered, residual=residual)
        task.advance(1)


def filled_layer(weights: Weights, number: int) -> DecoderLayer:
    """Layer `number` in fp32, without gradients."""
    with torch.device("meta"):
        layer = DecoderLayer(weights.config, number, dtype=torch.float32)
    prefix = f"layers.{number}."
    state = {name: weights.read(prefix + name).float() for name in layer.state_dict()}
    layer.load_state_dict(state, assign=True)
    for name in state:
        weights.release(prefix + name)
    return layer.requires_grad_(False)


def _gathered(
    layer: DecoderLayer,
    own: AttentionWeights,
    normed: Float[Tensor, "windows length hidden"],
    rope: tuple[Tensor, Tensor],
) -> dict[str, Tensor]:
    attention = layer.self_attn
    assert isinstance(attention, GQA)
    dims, length = attention.dims, normed.shape[1]
    heads, groups = dims.num_attention_heads, dims.num_key_value_heads
    inputs = own.q.shape[2]
    covariance = torch.zeros(inputs, inputs, dtype=torch.float64)
    for window in normed:
        extended = _extended(window, inputs)
        covariance += (extended.T @ extended).double()
    attended = torch.zeros_like(covariance)
    queries = torch.zeros(heads, dims.head_dim, dims.head_dim, dtype=torch.float64)
    sensitivity = torch.zeros(heads, dtype=torch.float64)
    distances = torch.zeros(heads, length, dtype=torch.float64)
    norms = torch.zeros(2, heads, dims.head_dim // 2, dtype=torch.float64)
    chosen = normed[:: max(1, len(normed) // ATTENTION_WINDOWS)][:ATTENTION_WINDOWS]
    metric = torch.einsum("hxd,hxe->hde", own.o, own.o).float()
    rope = rope[0][:length], rope[1][:length]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    for window in chosen:
        extended = _extended(window, inputs)
        q, k, v = (torch.einsum("hdx,tx->htd", w.float(), extended) for w in (own.q, own.k, own.v))
        turned_q, turned_k = (
            apply_rope(part.transpose(0, 1), *rope, interleave=False).transpose(0, 1)
            for part in (q, k)
        )
        for part, single in enumerate((q, k.repeat_interleave(heads // groups, dim=0))):
            norms[part] += _pair_norms(single)
        received = torch.zeros(length)
        for head in range(heads):
            group = head // (heads // groups)
            scores = turned_q[head] @ turned_k[group].T * attention.scale
            attends = scores.masked_fill_(future, -torch.inf).softmax(dim=-1)
            received += attends.sum(0)
            distances[head] += _by_distance(attends)
            per_query = _sensitivity(attends, v[group], metric[head])
            queries[head] += ((q[head] * per_query[:, None]).T @ q[head]).double()
            sensitivity[head] += per_query.sum().double()
        attended += ((extended * received[:, None]).T @ extended).double() / heads
    tokens = len(chosen) * length
    turns = torch.outer(torch.arange(length).double(), own.frequencies)
    turned = torch.polar(torch.ones_like(turns), turns)
    return {
        "covariance": covariance / (len(normed) * length),
        "attended": attended / tokens,
        "queries": queries / sensitivity.clamp(min=1e-30)[:, None, None],
        "sensitivity": sensitivity / tokens,
        "rotation": (distances.to(torch.complex128) @ turned) / tokens,
        "norms": norms.prod(0) / tokens**2,
    }


def _sensitivity(
    attends: Float[Tensor, "length length"],
    values: Float[Tensor, "length head_dim"],
    metric: Float[Tensor, "head_dim head_dim"],
) -> Float[Tensor, " length"]:
    """a_nm |W_O (v_m - o_n)|^2 of every query n, summed over its keys m; metric is W_O^T W_O."""
    out, moved = attends @ values, values @ metric
    apart = (moved * values).sum(-1) - 2 * out @ moved.T
    apart += ((out @ metric) * out).sum(-1, keepdim=True)
    return (attends * apart.clamp_(min=0)).sum(1)


def _by_distance(attends: Float[Tensor, "length length"]) -> Float64[Tensor, " length"]:
    """Sums along diagonals: what is attended to 0, 1, ... positions back."""
    length = len(attends)
    # Rows that are wider by one step than their stride lie skewed: diagonals become columns.
    skewed = F.pad(attends.flip(1), (0, length)).flatten()[:-length].view(length, -1)
    return skewed.sum(0, dtype=torch.float64)[length - 1 :]


def _pair_norms(heads: Float[Tensor, "heads length head_dim"]) -> Float64[Tensor, "heads pairs"]:
    """Length of every pair of channels, summed over tokens."""
    return torch.hypot(*heads.chunk(2, dim=-1)).sum(1).double()


def _extended(x: Float[Tensor, "length hidden"], inputs: int) -> Float[Tensor, "length inputs"]:
    """`x` with a constant 1 where there are biases."""
    return torch.cat([x, x.new_ones(len(x), inputs - x.shape[1])], dim=1)
