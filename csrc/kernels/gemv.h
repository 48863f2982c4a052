// GEMV path for decoding: few activation rows, bound by weight bandwidth. Each weight is touched as little as its
// storage allows: bf16, fp8 and int8 rows in file order, int8 and int4 groups as integers.
#pragma once

#include <utility>

#include "gemm.h"
#if defined(LOWLAT_AVX512)
#include "split_activations.h"
#endif

namespace lowlat::LOWLAT_ISA {

// --- row-major weights -----------------------------------------------------------------------------------------------

// A weight row is read sequentially, which hardware prefetchers follow; 16 rows in parallel, as transposing a tile
// reads them, they do not. 64 accumulator chains per output, one per lane of four consecutive vectors, are summed at
// the end.

constexpr int kChains = 4;
constexpr std::int64_t kStep = kChains * kColumns;  // columns
constexpr std::int64_t kBytesAhead = 8192;
#if defined(LOWLAT_AVX512)
constexpr int kRowMajorTokens = 6;
#else
constexpr int kRowMajorTokens = 4;
#endif

inline const char* row_start(const Matrix& w, std::int64_t row) {
  return static_cast<const char*>(w.data) + row * w.stride * w.element_bytes();
}

// The scale of a step of 128 columns of a row; 1 except for fp8 blocks.
template <Storage storage>
inline float step_scale(const Matrix& w, std::int64_t row, std::int64_t column) {
  if constexpr (storage == Storage::fp8) return row_scales(w, row)[column / kStep];
  return 1.0f;
}

// 32 whole columns of a row, within one scale step.
template <Storage storage>
inline P row_major_pairs(const char* start, std::int64_t column, float scale) {
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(start) + column;
  if constexpr (storage == Storage::fp8) return pairs_of_fp8(bytes, scale);
  if constexpr (storage == Storage::fp8_rows) return pairs_of_fp8(bytes);
  return whole_pairs<storage>(start, column);
}

// GEMV inner loop: lanes[t] are the partial sums of a weight row and T rows of x.
template <Storage storage, int T>
inline void dot_weight_row(const Matrix& w, std::int64_t row, const Activations& x, F (&lanes)[T]) {
  const char* start = row_start(w, row);
  F sums[kChains][T];
  LOWLAT_UNROLL
  for (int k = 0; k < kChains; ++k) {
    LOWLAT_UNROLL
    for (int t = 0; t < T; ++t) sums[k][t] = zero();
  }
  const std::int64_t whole = w.columns / kStep * kStep;
  for (std::int64_t column = 0; column < whole; column += kStep) {
    const bf16* at = x.values + column;
    const float scale = step_scale<storage>(w, row, column);
    LOWLAT_UNROLL
    for (int k = 0; k < kChains; ++k) {
      const std::int64_t c = column + k * kColumns;
      // May point beyond the matrix: prefetching unmapped memory does nothing.
      prefetch_far(start + c * w.element_bytes() + kBytesAhead);
      const P weights = row_major_pairs<storage>(start, c, scale);
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

using Lanes = float[kTile][kTile];

// Horizontal sums of the lanes of 16 outputs.
inline F sums_of_lanes(const Lanes& lanes) {
  F fours[4];
  LOWLAT_UNROLL
  for (int i = 0; i < 4; ++i) {
    const F first = fold(load(lanes[4 * i]), load(lanes[4 * i + 1]));
    fours[i] = fold_again(first, fold(load(lanes[4 * i + 2]), load(lanes[4 * i + 3])));
  }
  return fold_fully(fours);
}

template <Storage storage, int T>
inline void gemv_row_major(const Matrix& w, std::int64_t tile, const Activations& x, float* out,
                           std::int64_t out_stride) {
  const std::int64_t first = tile * kTile, rows = least(kTile, w.rows - first);
  alignas(64) Lanes lanes[T];
  if (rows < kTile) std::memset(lanes, 0, sizeof lanes);
  for (std::int64_t r = 0; r < rows; ++r) {
    F found[T];
    dot_weight_row<storage, T>(w, first + r, x, found);
    LOWLAT_UNROLL
    for (int t = 0; t < T; ++t) store(lanes[t][r], found[t]);
  }
  for (int t = 0; t < T; ++t) store(out + t * out_stride, sums_of_lanes(lanes[t]));
}

#if defined(LOWLAT_AVX512)

// If the activation rows exceed one block of accumulators, a tile is read several times, from cache after the first
// pass. Two weight rows then share the activation loads, and every pass but the first prefetches a share of the next
// tile, so that memory stays busy.
constexpr int kSharingTokens = 3;

// Prefetch schedule of a tile: some cache lines with every step of every row. The first pass prefetches the row
// kBytesAhead further on. Addresses may be beyond the matrix: prefetching unmapped memory does nothing.
class PrefetchSchedule {
 public:
  PrefetchSchedule(const Matrix& w, std::int64_t tile, NextTile next) : next_(next), steps_(most(1, w.columns / kStep)) {
    const std::int64_t row_bytes = w.stride * w.element_bytes(), first = tile * kTile;
    const std::int64_t rows_ahead = least(kTile, most(1, kBytesAhead / row_bytes));
    lines_ = kStep * w.element_bytes() / 64;
    here_ = {row_start(w, first + rows_ahead), row_bytes};
    if (next.w == nullptr) return;
    rows_here_ = least(kTile, w.rows - first) - rows_ahead;
    const std::int64_t bytes_there = next.w->stride * next.w->element_bytes();
    there_ = {row_start(*next.w, next.tile * kTile) - rows_here_ * bytes_there, bytes_there};
  }

  std::int64_t lines() const { return lines_; }

  // Where the lines of a row begin.
  const char* from(std::int64_t row) const {
    const Rows& rows = row < rows_here_ ? here_ : there_;
    return rows.start + row * rows.bytes;
  }

  // The next of `times` passes: its share of the next tile.
  void next_pass(std::int64_t time, std::int64_t times) {
    lines_ = 0;
    if (next_.w == nullptr) return;
    const Matrix& w = *next_.w;
    const std::int64_t first = next_.tile * kTile;
    const std::int64_t bytes = least(kTile, w.rows - first) * w.stride * w.element_bytes();
    const std::int64_t of_a_line = 64 * (times - 1) * kTile * steps_;
    const std::int64_t lines = (bytes + of_a_line - 1) / of_a_line;
    const std::int64_t row_bytes = 64 * lines * steps_, done = (time - 1) * kTile * row_bytes;
    if (done >= bytes) return;
    lines_ = lines;
    rows_here_ = kTile;
    here_ = {row_start(w, first) + done, row_bytes};
  }

 private:
  struct Rows {
    const char* start = nullptr;
    std::int64_t bytes = 0;
  };

  NextTile next_;
  std::int64_t steps_, lines_, rows_here_ = kTile;
  Rows here_, there_;
};

// lanes[r][t] of weight rows `row` and `other`, and T rows of x: dot_weight_row() of both.
template <Storage storage, int T>
inline void dot_weight_rows(const Matrix& w, std::int64_t row, std::int64_t other, const Activations& x,
                           const PrefetchSchedule& prefetches, std::int64_t in_tile, F (&lanes)[2][T]) {
  const std::int64_t rows[2] = {row, other};
  const char* starts[2] = {row_start(w, row), row_start(w, other)};
  const char* ahead[2] = {prefetches.from(in_tile), prefetches.from(in_tile + 1)};
  const std::int64_t lines = prefetches.lines(), whole = w.columns / kStep * kStep;
  F sums[kChains][2][T];
  LOWLAT_UNROLL
  for (int k = 0; k < kChains; ++k) {
    LOWLAT_UNROLL
    for (int t = 0; t < T; ++t) sums[k][0][t] = sums[k][1][t] = zero();
  }
  for (std::int64_t column = 0; column < whole; column += kStep) {
    for (std::int64_t line = 0; line < lines; ++line) {
      for (const char*& at : ahead) prefetch_far(std::exchange(at, at + 64));
    }
    const float one = step_scale<storage>(w, row, column), two = step_scale<storage>(w, other, column);
    LOWLAT_UNROLL
    for (int k = 0; k < kChains; ++k) {
      const std::int64_t c = column + k * kColumns;
      P first = row_major_pairs<storage>(starts[0], c, one), second = row_major_pairs<storage>(starts[1], c, two);
      keep(first);
      keep(second);
      LOWLAT_UNROLL
      for (int t = 0; t < T; ++t) {
        P activations = pairs(x.values + t * x.stride + c);
        keep(activations);
        sums[k][0][t] = dot(sums[k][0][t], first, activations);
        sums[k][1][t] = dot(sums[k][1][t], second, activations);
      }
    }
  }
  LOWLAT_UNROLL
  for (int r = 0; r < 2; ++r) {
    LOWLAT_UNROLL
    for (int t = 0; t < T; ++t) {
      lanes[r][t] = add(add(sums[0][r][t], sums[1][r][t]), add(sums[2][r][t], sums[3][r][t]));
      for (std::int64_t column = whole; column < w.columns; column += kColumns) {
        lanes[r][t] = dot(lanes[r][t], row_pairs(w, rows[r], column), pairs(x.values + t * x.stride + column));
      }
    }
  }
}

template <Storage storage, int T>
inline void gemv_row_major_twos(const Matrix& w, std::int64_t tile, const Activations& x, const PrefetchSchedule& prefetches,
                                float* out, std::int64_t out_stride) {
  const std::int64_t first = tile * kTile, rows = least(kTile, w.rows - first);
  alignas(64) Lanes lanes[T];
  if (rows < kTile) std::memset(lanes, 0, sizeof lanes);
  for (std::int64_t r = 0; r < rows; r += 2) {
    F found[2][T];
    dot_weight_rows<storage, T>(w, first + r, first + least(r + 1, rows - 1), x, prefetches, r, found);
    LOWLAT_UNROLL
    for (int t = 0; t < T; ++t) {
      store(lanes[t][r], found[0][t]);
      store(lanes[t][r + 1], found[1][t]);
    }
  }
  for (int t = 0; t < T; ++t) store(out + t * out_stride, sums_of_lanes(lanes[t]));
}

template <Storage storage>
inline void gemv_tile(const Matrix& w, std::int64_t tile, NextTile next, const Activations& x, float* out,
                        std::int64_t out_stride) {
  if (x.rows <= kRowMajorTokens) {
    return with_tokens<kRowMajorTokens>(
        x.rows, [&]<int T>() { gemv_row_major<storage, T>(w, tile, x, out, out_stride); });
  }
  const std::int64_t step = even_block(x.rows, kSharingTokens), times = (x.rows + step - 1) / step;
  PrefetchSchedule prefetches(w, tile, next);
  for (std::int64_t time = 0; time < times; ++time) {
    if (time > 0) prefetches.next_pass(time, times);
    const Activations part = x.from(time * step);
    float* to = out + time * step * out_stride;
    with_tokens<kSharingTokens>(least(step, part.rows), [&]<int T>() {
      gemv_row_major_twos<storage, T>(w, tile, part, prefetches, to, out_stride);
    });
  }
}

#else

template <Storage storage>
inline void gemv_tile(const Matrix& w, std::int64_t tile, NextTile, const Activations& x, float* out,
                        std::int64_t out_stride) {
  const std::int64_t step = even_block(x.rows, kRowMajorTokens);
  for (std::int64_t row = 0; row < x.rows; row += step) {
    const Activations part = x.from(row);
    with_tokens<kRowMajorTokens>(least(step, part.rows), [&]<int T>() {
      gemv_row_major<storage, T>(w, tile, part, out + row * out_stride, out_stride);
    });
  }
}

#endif

// GEMV with row-major weights (bf16, fp8, int8 rows): tiles [first, last) of y = x W^T.
inline void gemv_rows(const Matrix& w, std::int64_t first, std::int64_t last, NextTile next, const Activations& x,
                        float* out, std::int64_t out_stride) {
  for (std::int64_t tile = first; tile < last; ++tile, out += kTile) {
    const NextTile then = tile + 1 < last ? NextTile{&w, tile + 1} : next;
    switch (w.storage) {
      case Storage::fp8: gemv_tile<Storage::fp8>(w, tile, then, x, out, out_stride); break;
      case Storage::fp8_rows: gemv_tile<Storage::fp8_rows>(w, tile, then, x, out, out_stride); break;
      case Storage::int8_rows: gemv_tile<Storage::int8_rows>(w, tile, then, x, out, out_stride); break;
      default: gemv_tile<Storage::bf16>(w, tile, then, x, out, out_stride);
    }
  }
}

// --- int8 and int4 ----------------------------------------------------------------------------------------------------

#if !defined(LOWLAT_AVX512)

// Weights stay integers: 4 bits are exact in bf16 as 128 + n, which takes two instructions where the dequantized
// weight would take ten. The offset of 128 is removed by the sum of the activations; scale and minimum are applied
// once per group, in fp32.

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
inline void gemv_int4(const Matrix& w, std::int64_t tile, const Activations& x, const float* sums, float* out,
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

// The same for int8: a byte value + 128 is two 4-bit integers, 16 high + low.
template <int T>
inline void gemv_int8(const Matrix& w, std::int64_t tile, const Activations& x, const float* sums, float* out,
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

// GEMV with int8 or int4 groups: tiles [first, last) of y = x W^T; `panels` holds those of one tile.
inline void gemv_tiles(const Matrix& w, std::int64_t first, std::int64_t last, NextTile, const Activations& x,
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
          gemv_int8<T>(w, tile, part, sums, to, out_stride);
        } else {
          gemv_int4<T>(w, tile, part, sums, to, out_stride);
        }
      }
    });
  }
}

#endif

}  // namespace lowlat::LOWLAT_ISA
