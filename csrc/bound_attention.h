// Python binding of attention layers and the indexers of sparse attention.
#pragma once

#include <cstdint>
#include <numeric>
#include <optional>
#include <vector>

#include "bound_parts.h"

namespace lowlat {

inline BoundIndexer make_indexer(std::int64_t heads, std::int64_t rope_dim, std::int64_t pair_step, bool interleave,
                                 const BoundProjection& q, const BoundProjection& k, const BoundNorm& k_norm,
                                 const Array& k_norm_bias, const BoundMatrix& weights) {
  BoundIndexer bound;
  Indexer& indexer = bound.part;
  indexer.heads = heads;
  indexer.rope_dim = rope_dim;
  indexer.pair_step = pair_step;
  indexer.interleave = interleave;
  indexer.q = bound.keep(q);
  indexer.k = bound.keep(k);
  indexer.dim = indexer.k.weight.rows;
  indexer.k_norm = bound.keep(k_norm);
  indexer.k_norm_bias = elements<float>(k_norm_bias, "k_norm_bias", Type::fp32, {indexer.dim});
  bound.owners.push_back(k_norm_bias);
  indexer.weights = bound.keep(weights);
  require(heads > 0 && indexer.dim > 0 && indexer.dim % 2 == 0, "an indexer has no heads, or an odd number of channels");
  require(rope_dim >= 0 && rope_dim % 2 == 0 && rope_dim <= indexer.dim && pair_step > 0,
          "index keys are narrower than the rotated channels, or these are odd");
  require(indexer.k_norm.size == indexer.dim, "the norm of index keys has another size");
  require_shape(indexer.q.weight, heads * indexer.dim, indexer.q.weight.columns, "index q");
  require_shape(indexer.weights, heads, indexer.k.weight.columns, "index weights");
  return bound;
}

inline BoundAttention make_mla(std::int64_t heads, std::int64_t nope_dim, std::int64_t rope_dim, std::int64_t value_dim,
                               float scale, bool interleave, const std::optional<BoundProjection>& q_a,
                               const std::optional<BoundNorm>& q_a_norm, const BoundProjection& q, const BoundProjection& kv_a,
                               const std::vector<BoundNorm>& kv_a_norms, const BoundMatrix& kv_b,
                               const std::optional<BoundMatrix>& k_b, const BoundProjection& o,
                               const std::vector<std::optional<BoundLowRank>>& kv_b_updates, std::int64_t topk,
                               const std::optional<BoundIndexer>& indexer) {
  BoundAttention bound;
  Attention& a = bound.part;
  a.heads = heads;
  a.nope_dim = nope_dim;
  a.rope_dim = rope_dim;
  a.value_dim = value_dim;
  a.scale = scale;
  a.interleave = interleave;
  a.q_a = bound.keep(q_a);
  if (q_a_norm) a.q_a_norm = bound.keep(*q_a_norm);
  a.q = bound.keep(q);
  a.kv_a = bound.keep(kv_a);
  for (const BoundNorm& norm : kv_a_norms) a.kv_a_norms.push_back(bound.keep(norm));
  a.kv_b = bound.keep(kv_b);
  if (k_b) a.k_b = bound.keep(*k_b);
  a.o = bound.keep(o);
  a.latent_dim = a.kv_b.columns;
  require(a.latent_dim > 0 && rope_dim % 2 == 0, "kv_b has no columns, or rope_dim is odd");
  require(!a.kv_b.is_tiled(), "kv_b is not row-major");
  const std::int64_t head_rows = k_b ? value_dim : std::gcd(nope_dim, value_dim);
  require(!a.kv_b.is_interleaved || head_rows % kTile == 0, "heads of interleaved kv_b are no whole tiles");
  require_shape(a.kv_b, heads * (k_b ? value_dim : nope_dim + value_dim), a.latent_dim, "kv_b");
  a.kv_b_updates = keep_updates(bound, kv_b_updates, heads * (nope_dim + value_dim), a.latent_dim);
  if (a.k_b) {
    require(!a.k_b->is_tiled() && !a.k_b->has_row_scales(), "k_b has an unsupported storage");
    require(!a.k_b->is_interleaved || a.latent_dim % kTile == 0, "heads of interleaved k_b are no whole tiles");
    require_shape(*a.k_b, heads * a.latent_dim, nope_dim, "k_b");
    // Packed activations are found by address, so heads must not share padded ones.
    require(nope_dim % kGroup == 0, "k_b has columns that are no multiple of 32");
  }
  require_shape(a.q.weight, heads * (nope_dim + rope_dim), a.q.weight.columns, "q");
  require_shape(a.kv_a.weight, a.latent_dim + rope_dim, a.kv_a.weight.columns, "kv_a");
  require(a.q_a.has_value() == q_a_norm.has_value(), "q_a and its norm come together");
  if (a.q_a) {
    require(a.q_a->weight.rows == a.q.weight.columns && a.q_a_norm.size == a.q.weight.columns, "q_a does not fit q");
  }
  std::int64_t normalized = 0;
  for (const Norm& norm : a.kv_a_norms) normalized += norm.size;
  require(a.kv_a_norms.empty() || normalized == a.latent_dim, "the latent norms have other sizes");
  a.topk = topk;
  a.indexer = bound.keep(indexer);
  require(topk >= 0 && (topk > 0 || !indexer), "an indexer chooses no tokens");
  if (a.indexer) {
    require(a.indexer->rope_dim * a.indexer->pair_step <= rope_dim, "an indexer rotates at more frequencies than its layer has");
    require(a.indexer->q.weight.columns == (a.q_a ? a.q.weight.columns : a.kv_a.weight.columns) &&
                a.indexer->k.weight.columns == a.kv_a.weight.columns,
            "the indexer has another input");
  }
  return bound;
}

inline BoundAttention make_gqa(std::int64_t heads, std::int64_t kv_heads, std::int64_t head_dim, float scale, bool interleave,
                               std::int64_t window, const BoundProjection& q, const BoundProjection& k,
                               const BoundProjection& v, const BoundProjection& o, const std::optional<BoundNorm>& q_norm,
                               const std::optional<BoundNorm>& k_norm) {
  BoundAttention bound;
  Attention& a = bound.part;
  a.heads = heads;
  a.kv_heads = kv_heads;
  a.rope_dim = head_dim;
  a.scale = scale;
  a.interleave = interleave;
  a.window = window;
  a.q = bound.keep(q);
  a.k = bound.keep(k);
  a.v = bound.keep(v);
  a.o = bound.keep(o);
  a.q_norm = bound.keep(q_norm);
  a.k_norm = bound.keep(k_norm);
  require(kv_heads > 0 && heads % kv_heads == 0 && head_dim % 2 == 0 && window >= 0, "heads do not fit");
  require_shape(a.q.weight, heads * head_dim, a.q.weight.columns, "q");
  require_shape(a.k.weight, kv_heads * head_dim, a.q.weight.columns, "k");
  require_shape(a.v.weight, kv_heads * head_dim, a.q.weight.columns, "v");
  for (const std::optional<Norm>& norm : {a.q_norm, a.k_norm}) {
    if (norm) require(norm->size == head_dim, "a head's norm has another size");
  }
  return bound;
}

}  // namespace lowlat
