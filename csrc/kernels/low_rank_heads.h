// LoRA updates of MLA's kv_b_proj on the absorbed path. With the rows B_K and B_V of a head in B, W_UK^T q becomes
// W_UK^T q + A^T (B_K^T q), and W_UV c becomes W_UV c + B_V (A c).
#pragma once

#include "low_rank.h"

namespace lowlat::LOWLAT_ISA {

// B_K^T q of every token and head, at row token * heads + head of work.shrunk.
inline void shrink_queries(const Pass& pass, const Attention& a) {
  if (a.nope_dim == 0 || pass.work.absorbed.empty() || !updates_any(pass, a.kv_b_updates)) return;
  pass.each(pass.step.tokens * a.heads, [&](std::int64_t row) {
    const LowRank* update = update_of(pass, a.kv_b_updates, row / a.heads);
    if (update == nullptr) return;
    const std::int64_t first = row % a.heads * (a.nope_dim + a.value_dim);
    shrink(pass.work.q + row * a.query_dim(), a.nope_dim, update->b + first, update->b_stride, update->rank,
           shrunk_row(pass, row));
  });
}

// Adds A^T (B_K^T q) to the absorbed queries of a head: out [tokens, 32], latent channels from `first_channel` of the
// tokens from `first`.
inline void add_query_updates(const Pass& pass, const Attention& a, std::int64_t head, std::int64_t first_channel,
                              std::int64_t first, std::int64_t tokens, float* out) {
  if (!updates_any(pass, a.kv_b_updates)) return;
  for (std::int64_t t = first; t < first + tokens; ++t, out += kStrip) {
    const LowRank* update = update_of(pass, a.kv_b_updates, t);
    if (update == nullptr) continue;
    expand(shrunk_row(pass, t * a.heads + head), update->a + first_channel, update->a_stride, update->rank, out);
  }
}

// A c of the attended latent c of every token and head.
inline void shrink_latents(const Pass& pass, const Attention& a) {
  if (!updates_any(pass, a.kv_b_updates)) return;
  pass.each(pass.step.tokens * a.heads, [&](std::int64_t row) {
    const LowRank* update = update_of(pass, a.kv_b_updates, row / a.heads);
    if (update == nullptr) return;
    shrink(pass.work.mixed + row * pass.work.mixed_stride, a.latent_dim, update->a, update->a_stride, update->rank,
           shrunk_row(pass, row));
  });
}

// Adds B_V (A c) to the values of a head: out [tokens, 32], channels from `first_channel` of the tokens from `first`.
inline void add_value_updates(const Pass& pass, const Attention& a, std::int64_t head, std::int64_t first_channel,
                              std::int64_t first, std::int64_t tokens, float* out) {
  const std::int64_t row = head * (a.nope_dim + a.value_dim) + a.nope_dim + first_channel;
  add_updates(pass, a.kv_b_updates, row, tokens, out, [&](std::int64_t r) { return first + r; },
              [&](std::int64_t r) { return (first + r) * a.heads + head; });
}

}  // namespace lowlat::LOWLAT_ISA
