// Grouped GEMM for mixture-of-experts training: rows sorted by expert times their expert's matrix, and weight
// gradients.
//
// fp32 matrices are rounded to bf16 while they are packed into panels, gradients are written in fp32: no copy of
// either in memory. Every output is one chain of operations, so bits do not depend on the number of threads.
#pragma once

#include <vector>

#include "../training.h"
#include "../workspace.h"
#include "flash_attention.h"
#include "kv_cache.h"

namespace lowlat::LOWLAT_ISA::grouped {

constexpr std::int64_t kRowBlock = 256;   // activation rows whose products a thread holds
constexpr std::int64_t kOuterRows = 512;  // rows that a weight gradient is summed over at once
constexpr std::int64_t kChunk = 4;        // strips of 32 columns per work item

// Columns [column, column + 32) of a row as bf16 pairs, zero from `columns` on.
inline P row_of(const bf16* row, std::int64_t column, std::int64_t columns) {
  return load_pairs(row + column, columns - column);
}
inline P row_of(const float* row, std::int64_t column, std::int64_t columns) {
  const std::int64_t left = columns - column;
  if (left >= kColumns) return pairs_in_order(load(row + column), load(row + column + 16));
  return pairs_in_order(load(row + column, left), left > 16 ? load(row + column + 16, left - 16) : zero());
}

// An expert's matrix [rows, columns].
template <class T>
struct ExpertMatrix {
  const T* data;
  std::int64_t rows, columns;

  P at(std::int64_t row, std::int64_t column) const {
    return row < rows ? row_of(data + row * columns, column, columns) : zero_pairs();
  }
};

// Panels of 32 rows of a matrix against its columns, two tiles.
template <class T>
void load_strip(const ExpertMatrix<T>& w, std::int64_t strip, Panel* panels) {
  const std::int64_t count = num_panels(w.columns);
  for (int tile = 0; tile < 2; ++tile) {
    for (std::int64_t i = 0; i < count; ++i) {
      Panel& panel = panels[tile * count + i];
      for (int r = 0; r < kTile; ++r) panel[r] = w.at(strip * kStrip + tile * kTile + r, i * kColumns);
      transpose(panel, panel);
    }
  }
}

// Panels of 32 columns of a matrix against its rows.
template <class T>
void load_transposed_strip(const ExpertMatrix<T>& w, std::int64_t strip, Panel* panels) {
  const std::int64_t count = num_panels(w.rows), column = strip * kStrip;
  for (std::int64_t i = 0; i < count; ++i) {
    for (int j = 0; j < kTile; ++j) {
      const std::int64_t row = i * kColumns + 2 * j;
      interleave(w.at(row, column), w.at(row + 1, column), panels[i][j], panels[count + i][j]);
    }
  }
}

// The first row of every expert, and the end of the last.
inline std::vector<std::int64_t> first_rows(const std::int64_t* counts, std::int64_t experts) {
  std::vector<std::int64_t> first(experts + 1, 0);
  for (std::int64_t e = 0; e < experts; ++e) first[e + 1] = first[e] + counts[e];
  return first;
}

// Rows as the GEMM reads them: rows whose width is no multiple of the step are copied.
inline const bf16* whole_rows(const bf16* from, std::int64_t rows, std::int64_t width, Buffer& copy) {
  if (width % kColumns == 0) return from;
  auto* to = buffer_array<bf16>(copy, rows * round_up(width, kColumns));
  copy_rows(from, width, rows, width, to);
  return to;
}

// body(expert, strip) for the strips of all experts.
template <class Body>
void for_strips(Team& team, std::int64_t experts, std::int64_t strips, Body&& body) {
  team.for_chunks(experts * strips, kChunk, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t at = first; at < last; ++at) body(at / strips, at % strips);
  });
}

template <class T>
void group_products(Team& team, const GroupedPass& p) {
  const ProductSession session;
  const std::vector<std::int64_t> starts = first_rows(p.counts, p.experts);
  const std::int64_t width = p.is_transposed ? p.out : p.in, outputs = p.is_transposed ? p.in : p.out;
  const std::int64_t count = num_panels(width), stride = round_up(width, kColumns);
  Buffer panel_buffer, product_buffer, row_buffer;
  auto* panels = buffer_array<Panel>(panel_buffer, 2 * count);
  auto* sums = buffer_array<float>(product_buffer, kRowBlock * kStrip);
  for_strips(team, p.experts, (outputs + kStrip - 1) / kStrip, [&](std::int64_t expert, std::int64_t strip) {
    if (p.counts[expert] == 0) return;
    const ExpertMatrix<T> w{static_cast<const T*>(p.weight.data) + expert * p.out * p.in, p.out, p.in};
    p.is_transposed ? load_transposed_strip(w, strip, panels) : load_strip(w, strip, panels);
    const std::int64_t column = strip * kStrip, columns = least(kStrip, outputs - column);
    for (std::int64_t row = starts[expert]; row < starts[expert + 1]; row += kRowBlock) {
      const std::int64_t rows = least(kRowBlock, starts[expert + 1] - row);
      const bf16* x = whole_rows(p.rows + row * width, rows, width, row_buffer);
      multiply(panels, 2, count, count, x, stride, rows, sums, kStrip, false);
      for (std::int64_t r = 0; r < rows; ++r) {
        bf16* to = p.products + (row + r) * outputs + column;
        store_bf16(to, load(sums + r * kStrip), columns);
        if (columns > kTile) store_bf16(to + kTile, load(sums + r * kStrip + kTile), columns - kTile);
      }
    }
  });
}

inline void products(Team& team, const GroupedPass& p) {
  p.weight.is_bf16 ? group_products<bf16>(team, p) : group_products<float>(team, p);
}

// --- gradients of the matrices -------------------------------------------------------------------------------------------

struct OuterMemory {
  Buffer panels, transposed, edge;
};

// Strips [first, last) of the weight gradient of one expert.
inline void sum_outer(const OuterPass& p, std::int64_t expert, std::int64_t start, std::int64_t first, std::int64_t last,
                      OuterMemory& memory) {
  float* sums = p.sums + expert * p.out * p.in;
  auto* panels = buffer_array<Panel>(memory.panels, 2 * num_panels(kOuterRows));
  auto* transposed = buffer_array<bf16>(memory.transposed, p.out * kOuterRows);
  auto* edge = buffer_array<float>(memory.edge, p.out * kStrip);  // for the last, partial strip
  const std::int64_t end = start + p.counts[expert], in_edge = p.in % kStrip;
  for (std::int64_t row = start; row < end; row += kOuterRows) {
    const std::int64_t rows = least(kOuterRows, end - row), count = num_panels(rows);
    transpose_columns(view(p.left + row * p.out, rows, p.out, p.out), panels, transposed, count * kColumns);
    const Matrix right = view(p.right + row * p.in, rows, p.in, p.in);
    for (std::int64_t strip = first; strip < last; ++strip) {
      const bool is_whole = (strip + 1) * kStrip <= p.in;
      load_transposed_panels(right, strip * kStrip, 0, rows, panels, count);
      multiply(panels, 2, count, count, transposed, count * kColumns, p.out, is_whole ? sums + strip * kStrip : edge,
               is_whole ? p.in : kStrip, row > start);
    }
  }
  if (last * kStrip <= p.in) return;
  for (std::int64_t r = 0; r < p.out; ++r) {
    std::memcpy(sums + (r + 1) * p.in - in_edge, edge + r * kStrip, in_edge * sizeof(float));
  }
}

inline void outer(Team& team, const OuterPass& p) {
  const ProductSession session;
  const std::vector<std::int64_t> starts = first_rows(p.counts, p.experts);
  const std::int64_t strips = (p.in + kStrip - 1) / kStrip, chunks = (strips + kChunk - 1) / kChunk;
  OuterMemory memory;
  team.for_chunks(p.experts * chunks, 1, [&](std::int64_t task, std::int64_t) {
    const std::int64_t expert = task / chunks, first = task % chunks * kChunk, last = least(strips, first + kChunk);
    if (p.counts[expert] > 0) return sum_outer(p, expert, starts[expert], first, last, memory);
    for (std::int64_t r = 0; r < p.out; ++r) {
      float* from = p.sums + (expert * p.out + r) * p.in + first * kStrip;
      std::memset(from, 0, (least(p.in, last * kStrip) - first * kStrip) * sizeof(float));
    }
  });
}

}  // namespace lowlat::LOWLAT_ISA::grouped
