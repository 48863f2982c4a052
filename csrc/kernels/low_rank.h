// LoRA: low-rank updates of projections, each row by its own adapter: y += (x A^T) B^T. x A^T is computed in a phase
// of its own (shrink), and its product with B is added to the fp32 products of a strip before bias and rounding
// (expand).
//
// A row's update is one chain of operations that depends only on the row and its adapter: bits do not depend on the
// other rows of the batch. Rows without an adapter are not touched.
#pragma once

#include "pass.h"

namespace lowlat::LOWLAT_ISA {

template <int count>
inline void dot_rows(const bf16* x, std::int64_t columns, const bf16* m, std::int64_t stride, float* out) {
  F sums[count];
  LOWLAT_UNROLL
  for (int k = 0; k < count; ++k) sums[k] = zero();
  for (std::int64_t i = 0; i < columns; i += kTile) {
    const F value = load_bf16(x + i, columns - i);
    LOWLAT_UNROLL
    for (int k = 0; k < count; ++k) sums[k] = fma(value, load_bf16(m + k * stride + i), sums[k]);
  }
  LOWLAT_UNROLL
  for (int k = 0; k < count; ++k) out[k] = sum(sums[k]);
}

// out[k] = x . m[k] for the `rank` rows of m, whose columns may be read up to a multiple of 16.
inline void shrink(const bf16* x, std::int64_t columns, const bf16* m, std::int64_t stride, std::int64_t rank,
                   float* out) {
  std::int64_t k = 0;
  for (; k + 8 <= rank; k += 8) dot_rows<8>(x, columns, m + k * stride, stride, out + k);
  for (; k < rank; ++k) dot_rows<1>(x, columns, m + k * stride, stride, out + k);
}

// out += s m for 32 columns of m.
inline void expand(const float* s, const bf16* m, std::int64_t stride, std::int64_t rank, float* out) {
  F low = zero(), high = zero();
  for (std::int64_t k = 0; k < rank; ++k) {
    const F factor = set1(s[k]);
    low = fma(factor, load_bf16(m + k * stride), low);
    high = fma(factor, load_bf16(m + k * stride + kTile), high);
  }
  store(out, add(load(out), low));
  store(out + kTile, add(load(out + kTile), high));
}

// The update of a token by its adapter; null: none.
inline const LowRank* update_of(const Pass& pass, const std::vector<LowRank>& updates, std::int64_t token) {
  const std::int32_t adapter = pass.step.adapters[token];
  if (adapter < 0 || static_cast<std::size_t>(adapter) >= updates.size()) return nullptr;
  return updates[adapter].rank > 0 ? &updates[adapter] : nullptr;
}

// Whether tokens of the step may have updates of a projection.
inline bool updates_any(const Pass& pass, const std::vector<LowRank>& updates) {
  return !pass.step.adapters.empty() && !updates.empty();
}

inline float* shrunk_row(const Pass& pass, std::int64_t row) { return pass.work.shrunk + row * pass.work.shrunk_stride; }

// Adds the updates to a strip of products, out [rows, 32]: B x A^T for 32 rows of B from `first`. token_of(r) is the
// token of row r, shrunk_of(r) the index of its x A^T.
template <class TokenOf, class ShrunkOf>
inline void add_updates(const Pass& pass, const std::vector<LowRank>& updates, std::int64_t first, std::int64_t rows,
                        float* out, TokenOf&& token_of, ShrunkOf&& shrunk_of) {
  if (!updates_any(pass, updates)) return;
  for (std::int64_t r = 0; r < rows; ++r) {
    const LowRank* update = update_of(pass, updates, token_of(r));
    if (update == nullptr) continue;
    expand(shrunk_row(pass, shrunk_of(r)), update->b + first, update->b_stride, update->rank, out + r * kStrip);
  }
}

}  // namespace lowlat::LOWLAT_ISA
