// Activation quantization to 15-bit integers for GEMV with int8 and int4 weights on VNNI.
//
// The 32 activations of a weight group share a scale and become 15-bit integers, 128 high + low, each half a signed
// byte: two integer dot products with the stored weight bytes replace dequantizing every weight to bf16. The step is
// the largest activation over 16256, a sixtieth of bf16's rounding.
#pragma once

#include <cmath>
#include <vector>

#include "gemm.h"

namespace lowlat::LOWLAT_ISA {

// A group of a row: 8 words for the high bytes, 8 for the low ones, in the byte order of the weights.
struct SplitGroup {
  std::int32_t high[8], low[8];
};

// Split rows: [rows, groups], with a scale and the sum of the integers per group.
struct SplitRows {
  const SplitGroup* split;
  const float* scales;
  const std::int32_t* totals;
  std::int64_t groups;
};

// The order of a group's 32 activations in words of 4 bytes, for 16 of them at a time (matrix.h).
inline __m512i split_order(Storage storage) {
  const __m128i order = storage == Storage::int8 ? _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15)
                                                 : _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  return _mm512_broadcast_i32x4(order);
}

// A group with infinity or NaN becomes zeros with a NaN scale, which every product propagates.
inline void split_group(const bf16* x, __m512i order, SplitGroup& out, float& scale, std::int32_t& total) {
  constexpr float kMost = 127 * 128;
  const F first = load_bf16(x), last = load_bf16(x + kTile);
  const F magnitude = max(max(first, sub(zero(), first)), max(last, sub(zero(), last)));
  const float top = sum(mul(add(first, last), zero())) + largest(magnitude);
  scale = top / kMost;
  out = {};
  total = 0;
  if (!(scale > 0.0f) || !std::isfinite(scale)) {
    if (scale != 0.0f) scale = std::nanf("");
    return;
  }
  const F divisor = set1(scale), most = set1(kMost), least = set1(-kMost);
  const auto integers = [&](F v) {
    return _mm512_cvtps_epi32(min(most, max(least, div(v, divisor))).v);
  };
  const __m512i q[2] = {integers(first), integers(last)};
  __m256i bytes[2];
  __m128i high[2], low[2];
  for (int half = 0; half < 2; ++half) {
    const __m512i above = _mm512_srai_epi32(_mm512_add_epi32(q[half], _mm512_set1_epi32(64)), 7);
    high[half] = _mm512_cvtepi32_epi8(above);
    low[half] = _mm512_cvtepi32_epi8(_mm512_sub_epi32(q[half], _mm512_slli_epi32(above, 7)));
  }
  bytes[0] = _mm256_set_m128i(high[1], high[0]);
  bytes[1] = _mm256_set_m128i(low[1], low[0]);
  const __m512i all = _mm512_inserti64x4(_mm512_castsi256_si512(bytes[0]), bytes[1], 1);
  _mm512_storeu_si512(&out, _mm512_shuffle_epi8(all, order));
  total = _mm512_reduce_add_epi32(_mm512_add_epi32(q[0], q[1]));
}

// A thread's split rows: computed once for all strips it multiplies in a phase.
class SplitStore {
 public:
  void forget() {
    known_.clear();
    groups_ = 0;
  }

  // All rows of x in the byte order of w. Valid until the next call.
  SplitRows find(const Activations& x, const Matrix& w) {
    for (const Known& k : known_) {
      if (k.values == x.values && k.rows == x.rows && k.columns == w.columns && k.storage == w.storage) {
        return at(k.first, w.groups());
      }
    }
    const std::int64_t first = groups_, count = w.groups();
    groups_ += x.rows * count;
    if (groups_ > static_cast<std::int64_t>(split_.size())) {
      split_.resize(2 * groups_);
      scales_.resize(2 * groups_);
      totals_.resize(2 * groups_);
    }
    const __m512i order = split_order(w.storage);
    for (std::int64_t r = 0; r < x.rows; ++r) {
      for (std::int64_t g = 0; g < count; ++g) {
        const std::int64_t to = first + r * count + g;
        split_group(x.values + r * x.stride + g * kGroup, order, split_[to], scales_[to], totals_[to]);
      }
    }
    known_.push_back({x.values, x.rows, w.columns, w.storage, first});
    return at(first, count);
  }

 private:
  struct Known {
    const bf16* values;
    std::int64_t rows, columns;
    Storage storage;
    std::int64_t first;
  };

  SplitRows at(std::int64_t first, std::int64_t groups) const {
    return {split_.data() + first, scales_.data() + first, totals_.data() + first, groups};
  }

  std::vector<Known> known_;
  std::vector<SplitGroup> split_;
  std::vector<float> scales_;
  std::vector<std::int32_t> totals_;
  std::int64_t groups_ = 0;  // in use
};

inline thread_local SplitStore split_store;

// acc + 128 high + low: products of the bytes of 16 rows with the words of a group.
struct SplitSums {
  P high = zero_pairs(), low = zero_pairs();

  void add(P bytes, const SplitGroup& x, int word) {
    high = dot_bytes(high, bytes, set1_pair(static_cast<std::uint32_t>(x.high[word])));
    low = dot_bytes(low, bytes, set1_pair(static_cast<std::uint32_t>(x.low[word])));
  }
  P total() const { return {_mm512_add_epi32(_mm512_slli_epi32(high.v, 7), low.v)}; }
};

constexpr int kSplitTokens = 8;

// One tile of int8 or int4 and T rows of x.
template <Storage storage, int T>
inline void multiply_split(const Matrix& w, std::int64_t tile, NextTile next, const SplitRows& x, float* out,
                           std::int64_t out_stride) {
  const std::int64_t groups = w.groups();
  const std::uint8_t* data = w.tile_data(tile);
  const bool has_next = next.w != nullptr && next.w->is_tiled() && next.tile < next.w->tiles();
  const std::uint8_t* later = has_next ? next.w->tile_data(next.tile) : nullptr;
  const fp16* scale = static_cast<const fp16*>(w.scale) + tile * groups * kTile;
  const fp16* minimum = storage == Storage::int4 ? static_cast<const fp16*>(w.minimum) + tile * groups * kTile : nullptr;
  F total[T];
  LOWLAT_UNROLL
  for (int t = 0; t < T; ++t) total[t] = zero();
  for (std::int64_t g = 0; g < groups; ++g, data += w.group_bytes()) {
    SplitSums sums[T];
    for (int step = 0; step < (storage == Storage::int8 ? 8 : 4); ++step) {
      const P bytes = pairs(data + 64 * step);
      if (later != nullptr) prefetch_far(later + 64 * step);
      if constexpr (storage == Storage::int8) {
        LOWLAT_UNROLL
        for (int t = 0; t < T; ++t) sums[t].add(bytes, x.split[t * groups + g], step);
      } else {
        const P low = low_halves(bytes), high = high_halves(bytes);
        LOWLAT_UNROLL
        for (int t = 0; t < T; ++t) {
          sums[t].add(low, x.split[t * groups + g], 2 * step);
          sums[t].add(high, x.split[t * groups + g], 2 * step + 1);
        }
      }
    }
    if (later != nullptr) later += w.group_bytes();
    const F row_scale = load_fp16(scale + g * kTile);
    LOWLAT_UNROLL
    for (int t = 0; t < T; ++t) {
      const std::int64_t at = t * groups + g;
      const F by = set1(x.scales[at]);
      if constexpr (storage == Storage::int8) {
        const P middle = set1_pair(static_cast<std::uint32_t>(-128 * x.totals[at]));
        const P sum = {_mm512_add_epi32(sums[t].total().v, middle.v)};
        total[t] = fma(integers_to_float(sum), mul(row_scale, by), total[t]);
      } else {
        total[t] = fma(integers_to_float(sums[t].total()), mul(row_scale, by), total[t]);
        const float along = x.scales[at] * static_cast<float>(x.totals[at]);
        total[t] = fma(load_fp16(minimum + g * kTile), set1(along), total[t]);
      }
    }
  }
  LOWLAT_UNROLL
  for (int t = 0; t < T; ++t) store(out + t * out_stride, total[t]);
}

// Tiles [first, last) of y = x W^T for int8 or int4.
inline void gemv_tiles(const Matrix& w, std::int64_t first, std::int64_t last, NextTile next, const Activations& x,
                         Panel*, float* out, std::int64_t out_stride) {
  const SplitRows all = split_store.find(x, w);
  const std::int64_t step = even_block(x.rows, kSplitTokens);
  for (std::int64_t tile = first; tile < last; ++tile, out += kTile) {
    for (std::int64_t row = 0; row < x.rows; row += step) {
      const std::int64_t from = row * all.groups;
      const NextTile after = row > 0 ? NextTile{} : tile + 1 < last ? NextTile{&w, tile + 1} : next;
      const SplitRows part{all.split + from, all.scales + from, all.totals + from, all.groups};
      float* to = out + row * out_stride;
      with_tokens<kSplitTokens>(least(step, x.rows - row), [&]<int T>() {
        if (w.storage == Storage::int8) {
          multiply_split<Storage::int8, T>(w, tile, after, part, to, out_stride);
        } else {
          multiply_split<Storage::int4, T>(w, tile, after, part, to, out_stride);
        }
      });
    }
  }
}

}  // namespace lowlat::LOWLAT_ISA
