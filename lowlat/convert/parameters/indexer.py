"""Indexers for a dense MLA model (`--to dsa`): the config of the sparse model, and initial weights
from the model's own queries and keys.

Distillation starts from an indexer that scores as the attention does, as far as one key can:

- Rotary channels: at each frequency, the principal component of the keys of all groups (a complex
  number per group; RoPE commutes with complex factors). Models with decoupled RoPE have one group.
- Other channels: principal components of the latent, weighted by the queries that read it.
- Index head j has the queries of attention head j, projected on these components.
- weights_proj is the least-squares map of the layer's input to a constant, the mean over heads.
"""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from lowlat.attention.flash import FlashAttention
from lowlat.config.attention import short_name
from lowlat.config.hf.writer import config_to_hf
from lowlat.config.model import IndexerConfig, MLAConfig, ModelConfig, RopeConfig
from lowlat.model.indexer import Indexer, distinct_pairs
from lowlat.model.mla import MLA
from lowlat.model.transformer import Transformer
from lowlat.utils.errors import UserError

DEFAULT_TOPK = 2048
"""index_topk of the released models; by default at most an eighth of the context."""
RIDGE = 1e-2
"""Regularisation of least squares, relative to the mean variance of the input."""
SMALL = 0.1
"""Scale of channels that no key fills, relative to the others: they learn from the start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexerOptions:
    """Sizes and training of the indexers of a conversion to sparse attention (DSA)."""

    index_n_heads: int = 8
    index_head_dim: int = 128
    index_topk: int | None = None
    """Tokens to choose; None: 2,048, at most an eighth of the context."""
    index_rope_head_dim: int | None = None
    """Rotary channels; None: 64, at most qk_rope_head_dim."""
    warmup: int = 1_000_000
    """Tokens of the dense warm-up."""


def sparse_config(config: ModelConfig, options: IndexerOptions) -> tuple[ModelConfig, str]:
    """`config`, a dense MLA model, with an indexer in every layer, as a deepseek_v32 if that can
    express it, else as model_type lowlat; and the reason for the latter, else "".

    Raises UserError if the model has no MLA or indexers already, or for sizes that do not fit.
    """
    layers = [config.attention_of(layer) for layer in range(config.num_hidden_layers)]
    attention = [layer for layer in layers if isinstance(layer, MLAConfig)]
    if len(attention) < len(layers):
        raise UserError(f"--to dsa needs an MLA model; this one has {short_name(config.attention)}")
    if config.is_sparse:
        raise UserError("--to dsa: the model has indexers already; train them with lowlat train")
    rotary = min(layer.qk_rope_head_dim for layer in attention)
    if rotary == 0:
        raise UserError(
            "--to dsa needs rotary channels in every layer; this model has qk_rope_head_dim 0"
        )
    width = options.index_rope_head_dim or min(64, rotary)
    if width > rotary or width % 2 or width > options.index_head_dim:
        raise UserError(
            f"--index-rope-head-dim {width}: must be even, at most --index-head-dim "
            f"{options.index_head_dim} and at most the model's qk_rope_head_dim {rotary}"
        )
    context = config.max_position_embeddings
    indexer = IndexerConfig(
        index_n_heads=options.index_n_heads,
        index_head_dim=options.index_head_dim,
        index_topk=options.index_topk or min(DEFAULT_TOPK, max(1, context // 8)),
        index_rope_head_dim=None if {width} == {a.qk_rope_head_dim for a in attention} else width,
    )
    sparse = tuple(replace(layer, indexer=indexer) for layer in attention)
    made = replace(config, attention=sparse if isinstance(config.attention, tuple) else sparse[0])
    try:
        found = replace(made, model_type="deepseek_v32", attention=sparse[0])
        if isinstance(config.attention, tuple):
            raise UserError("a deepseek_v32 has the same sizes in all layers")
        config_to_hf(found)
    except UserError as reason:
        return replace(made, model_type="lowlat"), str(reason)
    return found, ""


class LayerInputs(NamedTuple):
    """Second moments of the inputs of a layer's attention over calibration tokens, fp64."""

    x: Float[Tensor, "hidden hidden"]
    """Mean of x x^T, of the normalised residual stream x."""
    mean: Float[Tensor, " hidden"]
    """Mean of x."""
    q_latent: Float[Tensor, "width width"]
    """Mean of c^Q (c^Q)^T; of x x^T without a query latent."""
    latent: Float[Tensor, "latent latent"]
    """Mean of c c^T, of the cached latent c."""
    latent_x: Float[Tensor, "latent hidden"]
    """Mean of c x^T."""
    rope: RopeConfig
    """RoPE of the layer."""


@torch.no_grad()
def measure_inputs(
    model: Transformer,
    windows: Int[Tensor, "windows length"],
    *,
    dtype: torch.dtype | None = None,
) -> list[LayerInputs]:
    """The inputs of every attention layer of the dense `model`, MTP modules included, over windows
    of calibration tokens. dtype: of activations; None: that of the weights.
    """
    layers = [module for module in model.modules() if isinstance(module, MLA)]
    sums: dict[int, list[Tensor]] = {}

    def add(layer: MLA, inputs: tuple[Any, ...]) -> None:
        x = inputs[0]
        latent = layer.kv_a_proj_with_mqa(x)[:, : layer.dims.kv_lora_rank]
        latent = layer.kv_a_layernorm(latent) if layer.dims.kv_a_layernorm else latent
        x, latent, q_latent = x.float(), latent.float(), layer.query_latent(x).float()
        found = [x.T @ x, x.sum(dim=0), q_latent.T @ q_latent, latent.T @ latent, latent.T @ x]
        known = sums.setdefault(layer.layer, [torch.zeros_like(one).double() for one in found])
        for total, one in zip(known, found, strict=True):
            total += one.double()

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(add).remove)
        length = windows.shape[1]
        for ids in windows:
            attention = FlashAttention([length])
            positions = attention.positions()
            hidden = model(ids, positions, attention, dtype=dtype)
            for depth in range(len(model.mtp)):
                ahead = ids.roll(-depth - 1)
                hidden = model.mtp_hidden(depth, hidden, ahead, positions, attention)
    count, config = windows.numel(), model.config
    return [
        LayerInputs(*(one / count for one in sums[number]), rope=config.rope_of(number))
        for number in sorted(sums)
    ]


@torch.no_grad()
def init_indexer(indexer: Indexer, attention: MLA, given: LayerInputs, *, seed: int) -> None:
    """Fill `indexer`, which has the config of the layer `attention`, from the weights of the latter
    and its `given` inputs.
    """
    rotary_keys, rotary_queries = _rotary_components(indexer, attention, given)
    keys, queries = _latent_components(indexer, attention, given)
    wk = torch.cat([rotary_keys, keys])
    heads = indexer.dims.index_n_heads
    per_head = torch.cat([rotary_queries, queries], dim=1)
    count = len(per_head)
    order = torch.arange(heads)
    per_head = per_head[order * count // heads if heads < count else order % count]
    generator = torch.Generator().manual_seed(seed)
    wk, per_head = _filled(wk, generator), _filled(per_head, generator)
    spread = torch.einsum("kx,xy,ky->k", wk, given.x, wk).mean().sqrt()
    # LayerNorm divides by the deviation of a key; the scale of scores is that of the softmax.
    indexer.wk.weight.copy_(wk)
    indexer.k_norm.weight.fill_(float(spread))
    indexer.k_norm.bias.zero_()
    scale = attention.scale * wk.shape[0] ** 0.5 / heads**0.5
    indexer.wq_b.weight.copy_((scale * per_head).flatten(0, 1))
    constant = torch.linalg.solve(_ridge(given.x), given.mean)
    indexer.weights_proj.weight.copy_(constant.expand(heads, -1))


def _rotary_components(
    indexer: Indexer, attention: MLA, given: LayerInputs
) -> tuple[Float[Tensor, "rotary hidden"], Float[Tensor, "heads rotary width"]]:
    """Rows of wk and of the index queries of every attention head, for the rotary channels."""
    dims = attention.dims
    pairs = torch.arange(dims.qk_rope_head_dim // 2)[indexer.pairs]
    distinct = distinct_pairs(given.rope, dims.qk_rope_head_dim)
    groups = dims.qk_rope_head_dim // 2 // distinct
    places = (pairs % distinct)[:, None] + distinct * torch.arange(groups)
    rows = attention.kv_a_proj_with_mqa.weight.double()[dims.kv_lora_rank :]
    keys = _complex_rows(rows, attention.interleave)[places]
    weight = _query_weight(attention).unflatten(0, (dims.num_attention_heads, -1))
    queries = weight[:, dims.qk_nope_head_dim :]
    queries = torch.stack([_complex_rows(one, attention.interleave)[places] for one in queries])
    covariance = keys @ given.x.to(keys.dtype) @ keys.mH
    q_power = torch.einsum(
        "hpgx,xy,hpgy->pg", queries, given.q_latent.to(queries.dtype), queries.conj()
    ).real
    root = q_power.clamp(min=0).sqrt().to(keys.dtype)
    # Components of the keys as the queries of their groups weigh them; pairs of one frequency take
    # one after the other.
    vectors = torch.linalg.eigh(root[..., None] * covariance * root[..., None, :]).eigenvectors
    same = pairs[:, None] % distinct == pairs % distinct
    rank = same.tril(-1).sum(dim=1)
    chosen = vectors[torch.arange(len(pairs)), :, groups - 1 - rank.clamp(max=groups - 1)]
    factors = chosen.conj() * root
    factors = factors / factors.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    component = (factors[..., None] * keys).sum(dim=1)
    variance = torch.einsum("px,xy,py->p", component, given.x.to(keys.dtype), component.conj()).real
    # K_g is about b_g times the component: a query of group g has conj(b_g) on it.
    shares = torch.einsum("pgx,xy,py->pg", keys, given.x.to(keys.dtype), component.conj())
    shares = shares / variance.clamp(min=1e-12)[:, None]
    per_head = (queries * shares.conj()[None, ..., None]).sum(dim=2)
    return _halves(component), torch.stack([_halves(one) for one in per_head])


def _latent_components(
    indexer: Indexer, attention: MLA, given: LayerInputs
) -> tuple[Float[Tensor, "rest hidden"], Float[Tensor, "heads rest width"]]:
    """The same for the other channels: zero rows where the latent has too few components."""
    dims = attention.dims
    rest = indexer.dims.index_head_dim - indexer.rope_dim
    weight = _query_weight(attention).unflatten(0, (dims.num_attention_heads, -1))
    w_uk = attention.up_projections(torch.float64)[0]
    # A query of head h reads the latent by W_UK_h^T q_h.
    readers = torch.einsum("hnc,hnx->hcx", w_uk, weight[:, : dims.qk_nope_head_dim])
    power = torch.einsum("hcx,xy,hdy->cd", readers, given.q_latent, readers)
    root = _root(given.latent)
    found = torch.linalg.eigh(root @ power @ root)
    count = min(rest, int((found.eigenvalues > 1e-9 * found.eigenvalues[-1].abs()).sum()))
    count = count if dims.qk_nope_head_dim else 0
    basis = found.eigenvectors[:, found.eigenvectors.shape[1] - count :]
    inverse = torch.linalg.pinv(root, rtol=1e-6, hermitian=True)
    # The latent as a linear map of the input: it may have a norm.
    linear = torch.linalg.solve(_ridge(given.x), given.latent_x.T).T
    keys = torch.zeros(rest, linear.shape[1], dtype=torch.float64)
    keys[:count] = basis.T @ inverse @ linear
    queries = torch.zeros(len(readers), rest, readers.shape[-1], dtype=torch.float64)
    queries[:, :count] = torch.einsum("cb,cd,hdx->hbx", basis, root, readers)
    return keys, queries


def _query_weight(attention: MLA) -> Float[Tensor, "rows width"]:
    """Projection of the query latent (of the input) to the queries of all heads."""
    project = attention.q_proj if attention.dims.q_lora_rank is None else attention.q_b_proj
    return project.weight.double()


def _complex_rows(
    rows: Float[Tensor, "channels inputs"], interleave: bool
) -> Complex[Tensor, "pairs inputs"]:
    if interleave:
        return torch.complex(rows[0::2], rows[1::2])
    return torch.complex(*rows.chunk(2))


def _halves(rows: Complex[Tensor, "pairs inputs"]) -> Float[Tensor, "channels inputs"]:
    """Half-split layout: real parts, then imaginary parts."""
    return torch.cat([rows.real, rows.imag])


def _filled(
    rows: Float[Tensor, "*heads channels inputs"], generator: torch.Generator
) -> Float[Tensor, "*heads channels inputs"]:
    """`rows` with small random ones in place of zeros."""
    drawn = torch.randn(rows.shape, generator=generator, dtype=rows.dtype)
    is_empty = rows.abs().amax(dim=-1, keepdim=True) == 0
    size = rows.square().mean().sqrt()
    return torch.where(is_empty, SMALL * size * drawn, rows)


def _ridge(moment: Float[Tensor, "width width"]) -> Float[Tensor, "width width"]:
    return moment + RIDGE * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)


def _root(moment: Float[Tensor, "width width"]) -> Float[Tensor, "width width"]:
    values, vectors = torch.linalg.eigh(moment)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
