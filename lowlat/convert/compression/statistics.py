"""Attention statistics of a layer on calibration text: covariances, sensitivities, mean rotations.

Memory holds the weights and statistics of one layer at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Complex128, Float, Float64, Int
from torch import Tensor

from lowlat.config.model import GQAConfig
from lowlat.convert.compression.layer_runner import LayerRunner, layer_weights
from lowlat.convert.parameters.shared_rope import half_order
from lowlat.convert.parameters.weights import Weights
from lowlat.ops.rope import apply_rope, inverse_frequencies, rotation_magnitude
from lowlat.utils.progress import Task

ATTENTION_WINDOWS = 8
"""Number of windows to measure attention on; the inputs' covariance uses all windows."""
BLOCK = 256
"""Queries per block of the attention computation."""
SINK_RATIO = 1000.0
"""Tokens whose squared residual stream exceeds the median by this factor are attention sinks: the
first token of a text, or an end of text within it. Measured ratios are 44,000 after the layer that
creates them and 1,700 after the last; five of them among 29,000 tokens tripled the mean.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionWeights:
    """One layer's projections in fp64. Inputs are extended by a constant 1, for the biases."""

    q: Float64[Tensor, "heads head_dim inputs"]
    k: Float64[Tensor, "groups head_dim inputs"]
    v: Float64[Tensor, "groups head_dim inputs"]
    o: Float64[Tensor, "heads hidden head_dim"]
    """Output projection of each head's values."""
    frequencies: Float64[Tensor, " pairs"]
    """Radians per position of the pairs of channels (i, i + head_dim / 2)."""
    magnitude: float
    """Factor on rotated queries and keys (YaRN and longrope)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerStatistics:
    """Averages over tokens. The sensitivity of a query n to a key m is a_nm |W_O (v_m - o_n)|^2:
    the squared change of the head's output per unit change of the score.
    """

    covariance: Float64[Tensor, "inputs inputs"]
    """E[x x^T] of the extended, normalised inputs."""
    attended: Float64[Tensor, "inputs inputs"]
    """E[x x^T] with each token weighted by the attention it receives."""
    queries: Float64[Tensor, "heads head_dim head_dim"]
    """E[q q^T] before rotation, weighted by sensitivity."""
    sensitivity: Float64[Tensor, " heads"]
    """Per query, summed over its keys."""
    rotation: Complex128[Tensor, "heads pairs"]
    """exp(i w (n - m)), averaged under attention."""
    norms: Float64[Tensor, "heads pairs"]
    """E |q_l| E |k_l| of every pair of channels (MHA2MLA's measure)."""
    residual: float
    """E |h|^2 of the residual stream after the attention, without attention sinks: the reference
    for relative errors.
    """

    @property
    def inputs(self) -> Float64[Tensor, "inputs inputs"]:
        """Covariance to weight errors by: the mean of `covariance` and `attended`."""
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
    """Statistics of each decoder layer of a GQA model, in order, on the CPU. Matrix products with
    weights use `dtype`, sums are at least fp32.
    """
    config = weights.config
    length = windows.shape[1]
    streams = list(weights.read("embed_tokens.weight")[windows].float())
    weights.release("embed_tokens.weight")
    every = max(1, len(windows) // ATTENTION_WINDOWS)
    measured = range(0, len(windows), every)[:ATTENTION_WINDOWS]
    for number in range(config.num_hidden_layers):
        own = read_attention(weights, number)
        layer = LayerRunner(config, number, layer_weights(weights, number), length, dtype)
        sums = _LayerSums(own, layer)
        for window, x in enumerate(streams):
            normed = layer.normed(x)
            sums.add(normed, with_attention=window in measured)
            x = x + layer.attend(normed)
            sums.add_residual(x)
            streams[window] = layer.finish(x)
        yield sums.statistics()
        task.advance(1)


class _LayerSums:
    """Sums over the windows of one layer."""

    def __init__(self, own: AttentionWeights, layer: LayerRunner) -> None:
        heads, head_dim, inputs = own.q.shape
        length = len(layer.rope[0])
        self._own, self._rope, self._scale = own, layer.rope, layer.softmax_scale
        self._projections = [part.flatten(0, 1).float() for part in (own.q, own.k, own.v)]
        self._metric = torch.einsum("hxd,hxe->hde", own.o, own.o).float()
        angles = torch.outer(torch.arange(length).double(), own.frequencies)
        self._rotations = torch.polar(torch.ones_like(angles), angles)
        self._tokens = self._attending = 0
        self._covariance, self._attended = torch.zeros(2, inputs, inputs, dtype=torch.float64)
        self._queries = torch.zeros(heads, head_dim, head_dim, dtype=torch.float64)
        self._sensitivity = torch.zeros(heads, dtype=torch.float64)
        self._rotation = torch.zeros(heads, head_dim // 2, dtype=torch.complex128)
        self._norms = torch.zeros(2, heads, head_dim // 2, dtype=torch.float64)
        self._residual, self._residuals = 0.0, 0

    def add(self, normed: Float[Tensor, "length hidden"], *, with_attention: bool) -> None:
        """Add a window of normalised inputs; with_attention: measure its attention as well."""
        # a constant 1 for the biases, if there are any
        ones = normed.new_ones(len(normed), self._own.q.shape[2] - normed.shape[1])
        extended = torch.cat([normed, ones], dim=1)
        self._covariance += extended.T @ extended
        self._tokens += len(normed)
        if with_attention:
            self._add_attention(extended)

    def add_residual(self, x: Float[Tensor, "length hidden"]) -> None:
        """Add the residual stream after the attention, without the window's first tokens and
        without attention sinks.
        """
        sizes = x[len(x) // 8 :].square().sum(-1)
        usual = sizes[~(sizes > SINK_RATIO * sizes.median())]  # NaN is preserved and reported
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
        rotated_q, rotated_k = (
            apply_rope(part.transpose(0, 1), self._rope, interleave=False).transpose(0, 1)
            for part in (q, k)
        )
        for part, single in enumerate((q, k.repeat_interleave(per_group, dim=0))):
            # length of every pair of channels
            self._norms[part] += torch.hypot(*single.chunk(2, dim=-1)).sum(1).double()
        angles = torch.view_as_real(self._rotations).flatten(1).float()
        received = torch.zeros(len(extended))
        for head, metric in enumerate(self._metric):
            group = head // per_group
            # Sensitivity is invariant to a common shift of all values.
            values = v[group] - v[group].mean(0)
            sizes = ((values @ metric) * values).sum(1, keepdim=True)
            payload = torch.cat([values, sizes, angles], dim=1)
            attended = self._attend(rotated_q[head], rotated_k[group], payload, received)
            out, size, rotated = attended.split([head_dim, 1, angles.shape[1]], dim=1)
            # sum over keys of a_nm |W (v_m - o_n)|^2 = sum of a_nm |W v_m|^2 - |W o_n|^2
            moved = (size[:, 0] - ((out @ metric) * out).sum(1)).clamp(min=0)
            self._queries[head] += (q[head] * moved[:, None]).T @ q[head]
            self._sensitivity[head] += moved.double().sum()
            mean_rotation = torch.view_as_complex(rotated.double().unflatten(1, (-1, 2)))
            self._rotation[head] += (self._rotations * mean_rotation.conj()).sum(0)
        self._attended += (extended * received[:, None]).T @ extended / len(self._metric)
        self._attending += len(extended)

    def _attend(
        self,
        q: Float[Tensor, "length head_dim"],
        k: Float[Tensor, "length head_dim"],
        payload: Float[Tensor, "length width"],
        received: Float[Tensor, " length"],
    ) -> Float[Tensor, "length width"]:
        """Attention-weighted mean of `payload` for each query; adds the attention that each key
        gets to `received`. Blocks of queries fit the CPU's cache.
        """
        outputs: list[Tensor] = []
        for start in range(0, len(q), BLOCK):
            stop = min(start + BLOCK, len(q))
            scores = q[start:stop] @ k[:stop].T * self._scale
            future = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)
            scores[:, start:].masked_fill_(future, -torch.inf)
            probabilities = scores.softmax(dim=-1)
            received[:stop] += probabilities.sum(0)
            outputs.append(probabilities @ payload[:stop])
        return torch.cat(outputs)
