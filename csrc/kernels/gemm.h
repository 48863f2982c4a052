// GEMM (matmul) microkernel by dot products of bf16 pairs: activation rows times packed weight panels.
#pragma once

#include "panels.h"

namespace lowlat::LOWLAT_ISA {

// Two accumulator chains per output, even and odd pairs, hide the latency of the dot instruction.
template <int T>
inline void dot_panel(const Panel& panel, const bf16* x, std::int64_t stride, F (&even)[T], F (&odd)[T]) {
  for (int j = 0; j < 16; j += 2) {
    LOWLAT_UNROLL
    for (int t = 0; t < T; ++t) even[t] = dot(even[t], panel[j], set1_pair(word_at(x + t * stride + 2 * j)));
    LOWLAT_UNROLL
    for (int t = 0; t < T; ++t) odd[t] = dot(odd[t], panel[j + 1], set1_pair(word_at(x + t * stride + 2 * j + 2)));
  }
}

constexpr int kLinesAhead = 6;  // cache lines prefetched per panel

// Panels of tiles, `tile_step` panels apart.
struct StoredPanels {
  const Panel* panels;
  std::int64_t tile_step;

  template <int K>
  void get(std::int64_t i, int j, P (&tiles)[K]) const {
    for (int k = 0; k < K; ++k) tiles[k] = panels[k * tile_step + i][j];
  }
};

// Activation operand: pair p of row t in the panel that advance() has reached. Row-major, `stride` elements between
// rows.
struct PlainRows {
  const bf16* x;
  std::int64_t stride;

  P pair(std::int64_t t, int p) const { return set1_pair(word_at(x + t * stride + 2 * p)); }
  void advance() { x += kColumns; }
  PlainRows from(std::int64_t row) const { return {x + row * stride, stride}; }
};

// Interleaved: for each pair, the words of all rows.
struct PairedRows {
  const std::uint32_t* x;
  std::int64_t width;  // words per pair

  P pair(std::int64_t t, int p) const { return set1_pair(x[p * width + t]); }
  void advance() { x += kColumns / 2 * width; }
  PairedRows from(std::int64_t row) const { return {x + row, width}; }
};

// Microkernel: T rows times K tiles; source.get(i, j, tiles) returns vector j of panel i.
template <int T, int K, class Source, class Rows>
inline void multiply_block(const Source& source, std::int64_t count, Rows x, float* out, std::int64_t out_stride,
                           bool adds, Prefetcher* ahead) {
  F even[K][T], odd[K][T];
  LOWLAT_UNROLL
  for (int k = 0; k < K; ++k) {
    LOWLAT_UNROLL
    for (int t = 0; t < T; ++t) {
      even[k][t] = adds ? load(out + t * out_stride + k * kTile) : zero();
      odd[k][t] = zero();
    }
  }
  for (std::int64_t i = 0; i < count; ++i, x.advance()) {
    if (ahead != nullptr) ahead->ask(kLinesAhead);
    for (int j = 0; j < 16; j += 2) {
      P tiles[K];
      source.get(i, j, tiles);
      LOWLAT_UNROLL
      for (int t = 0; t < T; ++t) {
        const P first = x.pair(t, j);
        LOWLAT_UNROLL
        for (int k = 0; k < K; ++k) even[k][t] = dot(even[k][t], tiles[k], first);
      }
      source.get(i, j + 1, tiles);
      LOWLAT_UNROLL
      for (int t = 0; t < T; ++t) {
        const P second = x.pair(t, j + 1);
        LOWLAT_UNROLL
        for (int k = 0; k < K; ++k) odd[k][t] = dot(odd[k][t], tiles[k], second);
      }
    }
  }
  LOWLAT_UNROLL
  for (int k = 0; k < K; ++k) {
    LOWLAT_UNROLL
    for (int t = 0; t < T; ++t) store(out + t * out_stride + k * kTile, add(even[k][t], odd[k][t]));
  }
}

// out[r][16 k + lane] = sum over the panels of tile k, `tile_step` panels apart, of panel . x[r]; `adds` accumulates.
// Two tiles at a time share the activation broadcasts if that keeps as many accumulator chains busy.
template <class Rows>
inline void multiply_by_dots(const Panel* panels, std::int64_t tiles, std::int64_t tile_step, std::int64_t count,
                             const Rows& x, std::int64_t rows, float* out, std::int64_t out_stride, bool adds,
                             Prefetcher* ahead) {
  constexpr int kFew = kTokens / 2;
  const std::int64_t step = even_block(rows), few = even_block(rows, kFew);
  const std::int64_t twos = 2 * few >= step ? tiles / 2 : 0;
  const auto there = [&](const Panel* from) { return StoredPanels{from, tile_step}; };
  for (std::int64_t two = 0; two < twos; ++two, panels += 2 * tile_step, out += 2 * kTile) {
    for (std::int64_t row = 0; row < rows; row += few) {
      with_tokens<kFew>(least(few, rows - row), [&]<int T>() {
        multiply_block<T, 2>(there(panels), count, x.from(row), out + row * out_stride, out_stride, adds, ahead);
      });
    }
  }
  for (std::int64_t tile = 2 * twos; tile < tiles; ++tile, panels += tile_step, out += kTile) {
    for (std::int64_t row = 0; row < rows; row += step) {
      with_tokens(least(step, rows - row), [&]<int T>() {
        multiply_block<T, 1>(there(panels), count, x.from(row), out + row * out_stride, out_stride, adds, ahead);
      });
    }
  }
}

inline void multiply_by_dots(const Panel* panels, std::int64_t tiles, std::int64_t tile_step, std::int64_t count,
                             const bf16* x, std::int64_t stride, std::int64_t rows, float* out, std::int64_t out_stride,
                             bool adds, Prefetcher* ahead = nullptr) {
  multiply_by_dots(panels, tiles, tile_step, count, PlainRows{x, stride}, rows, out, out_stride, adds, ahead);
}

// GEMV with W^T: out[c] = sum over rows of w[row][c] * x[row] for a single x. Same bits as load_transposed_panels()
// and multiply_by_dots(), but W is read once, row-major. Rows and columns are multiples of 32. out and odd [columns].
template <Storage storage>
inline void multiply_transposed(const Matrix& w, const bf16* x, float* out, float* odd) {
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
        prefetch_far(from + ahead);
        prefetch_far(from + row_bytes + ahead);
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

// One tile for at most 12 rows, packing panels on the fly.
inline void multiply_few(const Matrix& w, std::int64_t tile, NextTile next, const Activations& x, float* out,
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

}  // namespace lowlat::LOWLAT_ISA
