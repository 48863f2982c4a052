// GEMM with the columns of bf16 rows in several places (attention values): rows are transposed into panels on first
// use.
#pragma once

#include "linear.h"

namespace lowlat::LOWLAT_ISA {

// Several bf16 matrices that form one, stacked vertically: all but the last have 64 rows.
struct TransposedRows {
  static constexpr int kMost = 2, kRows = 64;
  const Matrix* parts[kMost];
  int count = 0;
  std::int64_t rows = 0;
  std::int64_t columns = 0;

  void add(const Matrix& part) {
    parts[count++] = &part;
    rows += part.rows;
    columns = part.columns;
  }
  // Whether 32 channels from `channel` are inside every edge.
  bool is_whole(std::int64_t channel) const { return rows % 32 == 0 && columns - channel >= kColumns; }
};

// Panels of 32 channels, packed on first use and reused, two tiles `apart` panels from each other.
template <bool keeps>
struct PanelsOnTheFly {
  const bf16* rows[TransposedRows::kMost];  // at the first channel
  std::int64_t strides[TransposedRows::kMost];
  Panel* panels;
  std::int64_t apart;

  PanelsOnTheFly(const TransposedRows& w, std::int64_t channel, Panel* panels) : panels(panels), apart(num_panels(w.rows)) {
    for (int i = 0; i < w.count; ++i) {
      rows[i] = static_cast<const bf16*>(w.parts[i]->data) + channel;
      strides[i] = w.parts[i]->stride;
    }
  }
  void get(std::int64_t i, int j, P (&tiles)[2]) const {
    const std::int64_t stride = strides[i / 2];
    const bf16* from = rows[i / 2] + (i % 2 * 32 + 2 * j) * stride;
    interleave(simd::pairs(from), simd::pairs(from + stride), tiles[0], tiles[1]);
    if constexpr (keeps) {
      panels[i][j] = tiles[0];
      panels[apart + i][j] = tiles[1];
    }
  }
};

// The first few activation rows pack the panels, the others reuse them.
template <class Rows>
inline void transpose_and_multiply(const TransposedRows& w, std::int64_t channel, Panel* panels, const Rows& x,
                              std::int64_t rows, float* out, std::int64_t out_stride, Prefetcher* ahead) {
  const std::int64_t count = num_panels(w.rows), few = even_block(rows, kTokens / 2);
  with_tokens<kTokens / 2>(few, [&]<int T>() {
    if (rows > few) {
      multiply_block<T, 2>(PanelsOnTheFly<true>(w, channel, panels), count, x, out, out_stride, true, ahead);
    } else {
      multiply_block<T, 2>(PanelsOnTheFly<false>(w, channel, panels), count, x, out, out_stride, true, ahead);
    }
  });
  multiply_by_dots(panels, 2, count, count, x.from(few), rows - few, out + few * out_stride, out_stride, true, ahead);
}

inline void transpose_panels(const TransposedRows& w, std::int64_t channel, Panel* panels) {
  for (int i = 0; i < w.count; ++i) {
    Panel* to = panels + i * TransposedRows::kRows / kColumns;
    load_transposed_panels(*w.parts[i], channel, 0, w.parts[i]->rows, to, num_panels(w.rows));
  }
}

// out[r][c] += sum over rows of w[row][channel + c] * x[r][row], c < 32, for all columns; `panels` holds those of two
// tiles. Whole rows are transposed when the first product needs them.
template <class Rows>
inline void multiply_transposed_by_dots(const TransposedRows& w, std::int64_t channel, Panel* panels, const Rows& x,
                                    std::int64_t rows, float* out, std::int64_t out_stride, Prefetcher* ahead) {
  if (w.is_whole(channel)) return transpose_and_multiply(w, channel, panels, x, rows, out, out_stride, ahead);
  const std::int64_t count = num_panels(w.rows);
  transpose_panels(w, channel, panels);
  multiply_by_dots(panels, 2, count, count, x, rows, out, out_stride, true, ahead);
}

// The same for rows `stride` apart, by the level's multiply().
inline void multiply_transposed_rows(const TransposedRows& w, std::int64_t channel, Panel* panels, const bf16* x,
                                 std::int64_t stride, std::int64_t rows, float* out, std::int64_t out_stride,
                                 Prefetcher* ahead) {
  if (kMultipliesByDots) {
    return multiply_transposed_by_dots(w, channel, panels, PlainRows{x, stride}, rows, out, out_stride, ahead);
  }
  const std::int64_t count = num_panels(w.rows);
  transpose_panels(w, channel, panels);
  multiply(panels, 2, count, count, x, stride, rows, out, out_stride, true, ahead);
}

// The columns of a bf16 matrix as rows `stride` apart, zero-padded to a multiple of 32; `panels` holds those of two
// tiles.
inline void transpose_columns(const Matrix& w, Panel* panels, bf16* to, std::int64_t stride) {
  const std::int64_t count = num_panels(w.rows);
  for (std::int64_t channel = 0; channel < w.columns; channel += kColumns) {
    load_transposed_panels(w, channel, 0, w.rows, panels, count);
    for (std::int64_t i = 0; i < 2 * count; ++i) {
      transpose(panels[i], panels[i]);
      const std::int64_t first = channel + i / count * kTile, there = least(kTile, w.columns - first);
      for (std::int64_t r = 0; r < there; ++r) {
        store_pairs(to + (first + r) * stride + i % count * kColumns, panels[i][r]);
      }
    }
  }
}

}  // namespace lowlat::LOWLAT_ISA
