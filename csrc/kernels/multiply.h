// Products of activation rows with panels, by dot products of pairs.
#pragma once

#include "panels.h"

namespace lowlat::LOWLAT_ISA {

// Two chains per output, even and odd pairs, hide the latency of the dot instruction.
template <int T>
inline void dot_panel(const Panel& panel, const bf16* x, std::int64_t stride, F (&even)[T], F (&odd)[T]) {
  for (int j = 0; j < 16; j += 2) {
    LOWLAT_UNROLL
    for (int t = 0; t < T; ++t) even[t] = dot(even[t], panel[j], set1_pair(word_at(x + t * stride + 2 * j)));
    LOWLAT_UNROLL
    for (int t = 0; t < T; ++t) odd[t] = dot(odd[t], panel[j + 1], set1_pair(word_at(x + t * stride + 2 * j + 2)));
  }
}

constexpr int kLinesAhead = 6;  // asked for with every panel

// T rows times K tiles that lie `tile_step` panels apart.
template <int T, int K>
inline void multiply_block(const Panel* panels, std::int64_t tile_step, std::int64_t count, const bf16* x,
                           std::int64_t stride, float* out, std::int64_t out_stride, bool adds, Ahead* ahead) {
  F even[K][T], odd[K][T];
  LOWLAT_UNROLL
  for (int k = 0; k < K; ++k) {
    LOWLAT_UNROLL
    for (int t = 0; t < T; ++t) {
      even[k][t] = adds ? load(out + t * out_stride + k * kTile) : zero();
      odd[k][t] = zero();
    }
  }
  for (std::int64_t i = 0; i < count; ++i, x += kColumns) {
    if (ahead != nullptr) ahead->ask(kLinesAhead);
    for (int j = 0; j < 16; j += 2) {
      LOWLAT_UNROLL
      for (int t = 0; t < T; ++t) {
        const P first = set1_pair(word_at(x + t * stride + 2 * j));
        LOWLAT_UNROLL
        for (int k = 0; k < K; ++k) even[k][t] = dot(even[k][t], panels[k * tile_step + i][j], first);
      }
      LOWLAT_UNROLL
      for (int t = 0; t < T; ++t) {
        const P second = set1_pair(word_at(x + t * stride + 2 * j + 2));
        LOWLAT_UNROLL
        for (int k = 0; k < K; ++k) odd[k][t] = dot(odd[k][t], panels[k * tile_step + i][j + 1], second);
      }
    }
  }
  LOWLAT_UNROLL
  for (int k = 0; k < K; ++k) {
    LOWLAT_UNROLL
    for (int t = 0; t < T; ++t) store(out + t * out_stride + k * kTile, add(even[k][t], odd[k][t]));
  }
}

// out[r][16 k + lane] = sum over the panels of tile k, `tile_step` panels apart, of panel . x[r]; plus what is there if
// `adds`. Tiles are taken in twos, which share what is broadcast, where that keeps as many chains of dot products
// going.
inline void multiply_by_dots(const Panel* panels, std::int64_t tiles, std::int64_t tile_step, std::int64_t count,
                             const bf16* x, std::int64_t stride, std::int64_t rows, float* out, std::int64_t out_stride,
                             bool adds, Ahead* ahead = nullptr) {
  constexpr int kFew = kTokens / 2;
  const std::int64_t step = even_block(rows), few = even_block(rows, kFew);
  const std::int64_t twos = 2 * few >= step ? tiles / 2 : 0;
  for (std::int64_t two = 0; two < twos; ++two, panels += 2 * tile_step, out += 2 * kTile) {
    for (std::int64_t row = 0; row < rows; row += few) {
      with_tokens<kFew>(least(few, rows - row), [&]<int T>() {
        multiply_block<T, 2>(panels, tile_step, count, x + row * stride, stride, out + row * out_stride, out_stride,
                             adds, ahead);
      });
    }
  }
  for (std::int64_t tile = 2 * twos; tile < tiles; ++tile, panels += tile_step, out += kTile) {
    for (std::int64_t row = 0; row < rows; row += step) {
      with_tokens(least(step, rows - row), [&]<int T>() {
        multiply_block<T, 1>(panels, tile_step, count, x + row * stride, stride, out + row * out_stride, out_stride,
                             adds, ahead);
      });
    }
  }
}

// out[c] = sum over rows of w[row][c] * x[row] for the one row x: the bits of load_turned_panels() and
// multiply_by_dots(), but W is read once, as it lies. Rows and columns are multiples of 32. out and odd [columns].
template <Storage storage>
inline void multiply_turned(const Matrix& w, const bf16* x, float* out, float* odd) {
  constexpr int kRows = 8, kAhead = 16;
  const std::int64_t row_bytes = w.stride * w.element_bytes();
  std::memset(out, 0, w.columns * sizeof(float));
  std::memset(odd, 0, w.columns * sizeof(float));
  for (std::int64_t row = 0; row < w.rows; row += kRows) {
    const char* base = static_cast<const char*>(w.data) + row * row_bytes;
    P both[kRows / 2];
    for (int i = 0; i < kRows / 2; ++i) both[i] = set1_pair(word_at(x + row + 2 * i));
    for (std::int64_t c = 0; c < w.columns; c += kColumns) {
      F sums[2][2] = {{load(out + c), load(out + c + kTile)}, {load(odd + c), load(odd + c + kTile)}};
      for (int i = 0; i < kRows / 2; ++i) {
        const char* from = base + 2 * i * row_bytes;
        const std::int64_t ahead = kAhead * row_bytes + c * w.element_bytes();
        prefetch(from + ahead);
        prefetch(from + row_bytes + ahead);
        P low, high;
        interleave(whole_pairs<storage>(from, c), whole_pairs<storage>(from + row_bytes, c), low, high);
        sums[i % 2][0] = dot(sums[i % 2][0], low, both[i]);
        sums[i % 2][1] = dot(sums[i % 2][1], high, both[i]);
      }
      for (int half = 0; half < 2; ++half) {
        store(out + c + half * kTile, sums[0][half]);
        store(odd + c + half * kTile, sums[1][half]);
      }
    }
  }
  for (std::int64_t c = 0; c < w.columns; c += kTile) store(out + c, add(load(out + c), load(odd + c)));
}

// One tile for at most 12 rows, with panels made on the way: where reading the weights is all the time.
inline void multiply_stream(const Matrix& w, std::int64_t tile, NextTile next, const Activations& x, float* out,
                            std::int64_t out_stride) {
  with_tokens(x.rows, [&]<int T>() {
    F even[T], odd[T];
    LOWLAT_UNROLL
    for (int t = 0; t < T; ++t) even[t] = odd[t] = zero();
    for (std::int64_t i = 0; i < num_panels(w.columns); ++i) {
      Panel panel;
      load_panel(w, tile, i, panel);
      if (next.w != nullptr) prefetch_panel(*next.w, next.tile, i, false);
      dot_panel<T>(panel, x.values + i * kColumns, x.stride, even, odd);
    }
    LOWLAT_UNROLL
    for (int t = 0; t < T; ++t) store(out + t * out_stride, add(even[t], odd[t]));
  });
}

// --- int8 and int4 where reading the weights is all the time ----------------------------------------------------------

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

// Tiles [first, last) of y = x W^T for int8 or int4; `sums` has room for 12 rows of groups.
inline void stream_tiles(const Matrix& w, std::int64_t first, std::int64_t last, const Activations& x, float* sums,
                         float* out, std::int64_t out_stride) {
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

// --- any storage --------------------------------------------------------------------------------------------------------

// Tiles [first, last), at most two, of y = x W^T by dot products. `panels` has room for both.
inline void multiply_rows_by_dots(const Matrix& w, std::int64_t first, std::int64_t last, NextTile next,
                                  const Activations& x, Panel* panels, float* out, std::int64_t out_stride) {
  if (x.is_stream && w.is_tiled()) {
    return stream_tiles(w, first, last, x, reinterpret_cast<float*>(panels), out, out_stride);
  }
  if (x.rows > kTokens) {
    const std::int64_t count = num_panels(w.columns);
    for (std::int64_t tile = first; tile < last; ++tile) load_panels(w, tile, panels + (tile - first) * count);
    return multiply_by_dots(panels, last - first, count, count, x.values, x.stride, x.rows, out, out_stride, false);
  }
  for (std::int64_t tile = first; tile < last; ++tile, out += kTile) {
    multiply_stream(w, tile, tile + 1 < last ? NextTile{&w, tile + 1} : next, x, out, out_stride);
  }
}

}  // namespace lowlat::LOWLAT_ISA
