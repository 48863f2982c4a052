"""What compression needs to know of a layer's attention, measured on calibration text.

Layers are run one after the other, so that one layer's weights and statistics are in memory at a
time. Owns the measuring; what follows from it is `convert.components`'s and `convert.factors`'s.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Complex128, Float, Float64, Int
from torch import Tensor

from lowlat.config.model import GQAConfig
from lowlat.convert.layer_run import LayerRun, layer_weights
from lowlat.convert.rotary import half_order
from lowlat.convert.weights import Weights
from lowlat.ops.rope import apply_rope, inverse_frequencies, rotation_magnitude
from lowlat.utils.progress import Task

ATTENTION_WINDOWS = 8
"""Windows whose attention is looked at; the inputs' covariance comes from all."""
BLOCK = 256
"""Queries whose attention is computed at a time."""
HUGE = 1000.0
"""Squared residual streams of so many times the median are of attention sinks: a text's first token
and an end of text within it, 44,000 times from the layer on that makes them, 1,700 at the end. Five
such tokens among 29,000 made the mean three times as large.
"""


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
    """E |h|^2 of the residual stream after the attention, attention sinks left out: what a change
    is to be compared with.
    """

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
    order = half_order(rope, dims.head_dim)

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
    weights: Weights, windows: Int[Tensor, "windows length"], dtype: torch.dtype, task: Task
) -> Iterator[LayerStatistics]:
    """Statistics of each decoder layer of a GQA model, in order, on the CPU; products with weights
    are of `dtype`, what is gathered is fp32.
    """
    config = weights.config
    length = windows.shape[1]
    streams = list(weights.read("embed_tokens.weight")[windows].float())
    weights.release("embed_tokens.weight")
    every = max(1, len(windows) // ATTENTION_WINDOWS)
    looked_at = range(0, len(windows), every)[:ATTENTION_WINDOWS]
    for number in range(config.num_hidden_layers):
        own = read_attention(weights, number)
        layer = LayerRun(config, number, layer_weights(weights, number), length, dtype)
        gathered = _Gathered(own, layer)
        for window, x in enumerate(streams):
            normed = layer.normed(x)
            gathered.add(normed, attends=window in looked_at)
            x = x + layer.attend(normed)
            gathered.add_residual(x)
            streams[window] = layer.finish(x)
        yield gathered.statistics()
        task.advance(1)


class _Gathered:
    """Sums over the windows of one layer."""

    def __init__(self, own: AttentionWeights, layer: LayerRun) -> None:
        heads, head_dim, inputs = own.q.shape
        length = len(layer.rope[0])
        self._own, self._rope, self._scale = own, layer.rope, layer.softmax_scale
        self._projections = [part.flatten(0, 1).float() for part in (own.q, own.k, own.v)]
        self._metric = torch.einsum("hxd,hxe->hde", own.o, own.o).float()
        turns = torch.outer(torch.arange(length).double(), own.frequencies)
        self._turned = torch.polar(torch.ones_like(turns), turns)
        self._tokens = self._attending = 0
        self._covariance, self._attended = torch.zeros(2, inputs, inputs, dtype=torch.float64)
        self._queries = torch.zeros(heads, head_dim, head_dim, dtype=torch.float64)
        self._sensitivity = torch.zeros(heads, dtype=torch.float64)
        self._rotation = torch.zeros(heads, head_dim // 2, dtype=torch.complex128)
        self._norms = torch.zeros(2, heads, head_dim // 2, dtype=torch.float64)
        self._residual, self._residuals = 0.0, 0

    def add(self, normed: Float[Tensor, "length hidden"], *, attends: bool) -> None:
        """A window of normalised inputs; attends: look at its attention as well."""
        extended = _extended(normed, self._own.q.shape[2])
        self._covariance += extended.T @ extended
        self._tokens += len(normed)
        if attends:
            self._add_attention(extended)

    def add_residual(self, x: Float[Tensor, "length hidden"]) -> None:
        """The residual stream behind the attention, without the first tokens of the window and
        others that are huge: they are no measure.
        """
        sizes = x[len(x) // 8 :].square().sum(-1)
        usual = sizes[~(sizes > HUGE * sizes.median())]  # numbers that are none stay, and are told
        self._residual += float(usual.double().sum())
        self._residuals += len(usual)

    def statistics(self) -> LayerStatistics:
        """The averages."""
        return LayerStatistics(
            covariance=self._covariance / self._tokens,
            attended=self._attended / self._attending,
            queries=self._queries / self._sensitivity.clamp(min=1e-30)[:, None, None],
            sensitivity=self._sensitivity / self._attending,
            rotation=self._rotation / self._attending,
            norms=self._norms.prod(0) / self._attending**2,
            residual=self._residual / self._residuals,
        )

    def _add_attention(self, extended: Float[Tensor, "length inputs"]) -> None:
        head_dim = self._own.q.shape[1]
        q, k, v = (
            (extended @ projection.T).unflatten(1, (-1, head_dim)).transpose(0, 1)
            for projection in self._projections
        )
        per_group = len(q) // len(k)
        turned_q, turned_k = (
            apply_rope(part.transpose(0, 1), self._rope, interleave=False).transpose(0, 1)
            for part in (q, k)
        )
        for part, single in enumerate((q, k.repeat_interleave(per_group, dim=0))):
            self._norms[part] += _pair_norms(single)
        angles = torch.view_as_real(self._turned).flatten(1).float()
        received = torch.zeros(len(extended))
        for head, metric in enumerate(self._metric):
            group = head // per_group
            # Sensitivity does not change as all values move by the same.
            values = v[group] - v[group].mean(0)
            sizes = ((values @ metric) * values).sum(1, keepdim=True)
            carried = torch.cat([values, sizes, angles], dim=1)
            seen = self._seen(turned_q[head], turned_k[group], carried, received)
            out, size, turned = seen.split([head_dim, 1, angles.shape[1]], dim=1)
            # sum over keys of a_nm |W (v_m - o_n)|^2 = sum of a_nm |W v_m|^2 - |W o_n|^2
            moved = (size[:, 0] - ((out @ metric) * out).sum(1)).clamp(min=0)
            self._queries[head] += (q[head] * moved[:, None]).T @ q[head]
            self._sensitivity[head] += moved.double().sum()
            facing = torch.view_as_complex(turned.double().unflatten(1, (-1, 2)))
            self._rotation[head] += (self._turned * facing.conj()).sum(0)
        self._attended += (extended * received[:, None]).T @ extended / len(self._metric)
        self._attending += len(extended)

    def _seen(
        self,
        q: Float[Tensor, "length head_dim"],
        k: Float[Tensor, "length head_dim"],
        carried: Float[Tensor, "length width"],
        received: Float[Tensor, " length"],
    ) -> Float[Tensor, "length width"]:
        """What each query's attention makes of `carried`; what each key gets goes into `received`.
        Blocks of queries are small enough for the processor's cache.
        """
        seen: list[Tensor] = []
        for start in range(0, len(q), BLOCK):
            stop = min(start + BLOCK, len(q))
            scores = q[start:stop] @ k[:stop].T * self._scale
            future = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)
            scores[:, start:].masked_fill_(future, -torch.inf)
            attends = scores.softmax(dim=-1)
            received[:stop] += attends.sum(0)
            seen.append(attends @ carried[:stop])
        return torch.cat(seen)


def _pair_norms(heads: Float[Tensor, "heads length head_dim"]) -> Float64[Tensor, "heads pairs"]:
    """Length of every pair of channels, summed over tokens."""
    return torch.hypot(*heads.chunk(2, dim=-1)).sum(1).double()


def _extended(x: Float[Tensor, "length hidden"], inputs: int) -> Float[Tensor, "length inputs"]:
    """`x` with a constant 1 where there are biases."""
    return torch.cat([x, x.new_ones(len(x), inputs - x.shape[1])], dim=1)
