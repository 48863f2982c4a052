// Products of few activation rows, where reading the weights is all the time: each weight is touched as little as its
// storage allows.
#pragma once

#include "multiply.h"
#if defined(LOWLAT_AVX512)
#include "split_rows.h"
#endif

namespace lowlat::LOWLAT_ISA {

// --- rows as they lie -------------------------------------------------------------------------------------------------

// A row is read from its start to its end, which processors see coming; several rows side by side, as a tile that is
// turned takes them, they do not. 64 chains per output, one for each lane of four vectors that follow each other, are
// added up in the end.

constexpr int kChains = 4;
constexpr std::int64_t kBytesAhead = 8192;
#if defined(LOWLAT_AVX512)
constexpr int kLyingTokens = 6;
#else
constexpr int kLyingTokens = 4;
#endif

// 32 whole columns of a row.
template <Storage storage>
inline P lying_pairs(const Matrix& w, std::int64_t row, const char* start, std::int64_t column) {
  if constexpr (storage == Storage::fp8) return row_pairs(w, row, column);
  return whole_pairs<storage>(start, column);
}

// lanes[t] of a weight row and T rows of x.
template <Storage storage, int T>
inline void dot_lying_row(const Matrix& w, std::int64_t row, const Activations& x, F (&lanes)[T]) {
  constexpr std::int64_t kStep = kChains * kColumns;
  const char* start = static_cast<const char*>(w.data) + row * w.stride * w.element_bytes();
  F sums[kChains][T];
  LOWLAT_UNROLL
  for (int k = 0; k < kChains; ++k) {
    LOWLAT_UNROLL
    for (int t = 0; t < T; ++t) sums[k][t] = zero();
  }
  const std::int64_t whole = w.columns / kStep * kStep;
  for (std::int64_t column = 0; column < whole; column += kStep) {
    const bf16* at = x.values + column;
    LOWLAT_UNROLL
    for (int k = 0; k < kChains; ++k) {
      const std::int64_t c = column + k * kColumns;
      // Beyond the matrix, too: what is not there is not fetched.
      prefetch_far(start + c * w.element_bytes() + kBytesAhead);
      const P weights = lying_pairs<storage>(w, row, start, c);
      LOWLAT_UNROLL
      for (int t = 0; t < T; ++t) sums[k][t] = dot(sums[k][t], weights, pairs(at + t * x.stride + k * kColumns));
    }
  }
  LOWLAT_UNROLL
  for (int t = 0; t < T; ++t) lanes[t] = add(add(sums[0][t], sums[1][t]), add(sums[2][t], sums[3][t]));
  for (std::int64_t column = whole; column < w.columns; column += kColumns) {
    const P weights = row_pairs(w, row, column);
    LOWLAT_UNROLL
    for (int t = 0; t < T; ++t) lanes[t] = dot(lanes[t], weights, pairs(x.values + t * x.stride + column));
  }
}

// The sums of the lanes of 16 outputs.
inline F sums_of_lanes(const float (&lanes)[kTile][kTile]) {
  Panel turned;
  for (int i = 0; i < kTile; ++i) turned[i] = pairs(lanes[i]);
  transpose(turned, turned);
  alignas(64) float rows[kTile][kTile];
  for (int i = 0; i < kTile; ++i) store_pairs(rows[i], turned[i]);
  F sums[kTile];
  for (int i = 0; i < kTile; ++i) sums[i] = load(rows[i]);
  for (int width = kTile / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) sums[i] = add(sums[i], sums[i + width]);
  }
  return sums[0];
}

template <Storage storage, int T>
inline void multiply_lying(const Matrix& w, std::int64_t tile, const Activations& x, float* out,
                           std::int64_t out_stride) {
  const std::int64_t first = tile * kTile, rows = least(kTile, w.rows - first);
  alignas(64) float lanes[T][kTile][kTile];
  if (rows < kTile) std::memset(lanes, 0, sizeof lanes);
  for (std::int64_t r = 0; r < rows; ++r) {
    F found[T];
    dot_lying_row<storage, T>(w, first + r, x, found);
    LOWLAT_UNROLL
    for (int t = 0; t < T; ++t) store(lanes[t][r], found[t]);
  }
  for (int t = 0; t < T; ++t) store(out + t * out_stride, sums_of_lanes(lanes[t]));
}

// Tiles [first, last) of y = x W^T for rows that lie one after the other.
inline void stream_rows(const Matrix& w, std::int64_t first, std::int64_t last, const Activations& x, float* out,
                        std::int64_t out_stride) {
  const std::int64_t step = even_block(x.rows, kLyingTokens);
  for (std::int64_t tile = first; tile < last; ++tile, out += kTile) {
    for (std::int64_t row = 0; row < x.rows; row += step) {
      const Activations part = x.from(row);
      float* to = out + row * out_stride;
      with_tokens<kLyingTokens>(least(step, part.rows), [&]<int T>() {
        switch (w.storage) {
          case Storage::fp8: return multiply_lying<Storage::fp8, T>(w, tile, part, to, out_stride);
          case Storage::int8_rows: return multiply_lying<Storage::int8_rows, T>(w, tile, part, to, out_stride);
          default: return multiply_lying<Storage::bf16, T>(w, tile, part, to, out_stride);
        }
      });
    }
  }
}

// --- int8 and int4 ----------------------------------------------------------------------------------------------------

#if !defined(LOWLAT_AVX512)

// The numbers of a group stay integers: 4 bits of them are exact in bf16 as 128 + n, which costs two instructions where
// the weight itself would cost ten. What 128 adds is taken off by the sum of the activations, and the scale (and the
// minimum) come once per group, in fp32.

// sums[t][g] of the 32 activations of a group.
template <int T>
inline void group_sums(const Activations& x, std::int64_t groups, float* sums) {
  LOWLAT_UNROLL
  for (int t = 0; t < T; ++t) {
    const bf16* row = x.values + t * x.stride;
    for (std::int64_t g = 0; g < groups; ++g) {
      sums[t * groups + g] = sum(add(load_bf16(row + g * kGroup), load_bf16(row + g * kGroup + 16)));
    }
  }
}

template <int T>
inline void add_step(P integers, const bf16* x, std::int64_t stride, F (&acc)[T]) {
  LOWLAT_UNROLL
  for (int t = 0; t < T; ++t) acc[t] = dot(acc[t], integers, set1_pair(word_at(x + t * stride)));
}

// One tile; `sums` are those of group_sums().
template <int T>
inline void stream_int4(const Matrix& w, std::int64_t tile, const Activations& x, const float* sums, float* out,
                        std::int64_t out_stride) {
  const std::int64_t groups = w.groups();
  const std::uint8_t* data = static_cast<const std::uint8_t*>(w.data) + tile * groups * w.group_bytes();
  const fp16* scale = static_cast<const fp16*>(w.scale) + tile * groups * kTile;
  const fp16* minimum = static_cast<const fp16*>(w.minimum) + tile * groups * kTile;
  F total[T];
  LOWLAT_UNROLL
  for (int t = 0; t < T; ++t) total[t] = zero();
  for (std::int64_t g = 0; g < groups; ++g, data += w.group_bytes(), scale += kTile, minimum += kTile) {
    F even[T], odd[T];
    LOWLAT_UNROLL
    for (int t = 0; t < T; ++t) even[t] = odd[t] = zero();
    for (int step = 0; step < 4; ++step) {
      const bf16* at = x.values + g * kGroup + 8 * step;
      const P bytes = pairs(data + 64 * step);
      prefetch(data + 64 * step + 4096);
      add_step<T>(small_integers<0>(bytes), at, x.stride, even);
      add_step<T>(small_integers<4>(bytes), at + 2, x.stride, odd);
      add_step<T>(small_integers<8>(bytes), at + 4, x.stride, even);
      add_step<T>(small_integers<12>(bytes), at + 6, x.stride, odd);
    }
    const F row_scale = load_fp16(scale), row_minimum = load_fp16(minimum);
    LOWLAT_UNROLL
    for (int t = 0; t < T; ++t) {
      const float sum_x = sums[t * groups + g];
      const F value = sub(add(even[t], odd[t]), set1(128.0f * sum_x));
      total[t] = fma(row_minimum, set1(sum_x), fma(value, row_scale, total[t]));
    }
  }
  LOWLAT_UNROLL
  for (int t = 0; t < T; ++t) store(out + t * out_stride, total[t]);
}

// The same for int8, whose bytes value + 128 are two integers of 4 bits: 16 high + low.
template <int T>
inline void stream_int8(const Matrix& w, std::int64_t tile, const Activations& x, const float* sums, float* out,
                        std::int64_t out_stride) {
  const std::int64_t groups = w.groups();
  const std::uint8_t* data = static_cast<const std::uint8_t*>(w.data) + tile * groups * w.group_bytes();
  const fp16* scale = static_cast<const fp16*>(w.scale) + tile * groups * kTile;
  F total[T];
  LOWLAT_UNROLL
  for (int t = 0; t < T; ++t) total[t] = zero();
  for (std::int64_t g = 0; g < groups; ++g, data += w.group_bytes(), scale += kTile) {
    F low[T], high[T];
    LOWLAT_UNROLL
    for (int t = 0; t < T; ++t) low[t] = high[t] = zero();
    for (int step = 0; step < 8; ++step) {
      const bf16* at = x.values + g * kGroup + 4 * step;
      const P bytes = pairs(data + 64 * step);
      prefetch(data + 64 * step + 4096);
      add_step<T>(small_integers<0>(bytes), at, x.stride, low);
      add_step<T>(small_integers<4>(bytes), at, x.stride, high);
      add_step<T>(small_integers<8>(bytes), at + 2, x.stride, low);
      add_step<T>(small_integers<12>(bytes), at + 2, x.stride, high);
    }
    const F row_scale = load_fp16(scale);
    LOWLAT_UNROLL
    for (int t = 0; t < T; ++t) {
      // 16 (h + 128) + (l + 128) - (16 * 128 + 128 + 128) = 16 h + l - 128
      const F offset = set1(-2304.0f * sums[t * groups + g]);
      total[t] = fma(fma(high[t], set1(16.0f), add(low[t], offset)), row_scale, total[t]);
    }
  }
  LOWLAT_UNROLL
  for (int t = 0; t < T; ++t) store(out + t * out_stride, total[t]);
}

// Tiles [first, last) of y = x W^T for int8 or int4; `panels` has room for a tile's.
inline void stream_tiles(const Matrix& w, std::int64_t first, std::int64_t last, NextTile, const Activations& x,
                         Panel* panels, float* out, std::int64_t out_stride) {
  auto* sums = reinterpret_cast<float*>(panels);
  const std::int64_t step = even_block(x.rows);
  for (std::int64_t row = 0; row < x.rows; row += step) {
    with_tokens(least(step, x.rows - row), [&]<int T>() {
      const Activations part = x.from(row);
      group_sums<T>(part, w.groups(), sums);
      for (std::int64_t tile = first; tile < last; ++tile) {
        float* to = out + row * out_stride + (tile - first) * kTile;
        if (w.storage == Storage::int8) {
          stream_int8<T>(w, tile, part, sums, to, out_stride);
        } else {
          stream_int4<T>(w, tile, part, sums, to, out_stride);
        }
      }
    });
  }
}

#endif

}  // namespace lowlat::LOWLAT_ISA
