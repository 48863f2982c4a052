// Products with the columns of rows that lie in several places, one place after the other.
#pragma once

#include "linear.h"

namespace lowlat::LOWLAT_ISA {

// Matrices stored row by row that are one, each below the one before: all but the last have 64 rows.
struct TurnedRows {
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
  // Whether 32 channels from `channel` on need no care at any edge.
  bool is_whole(std::int64_t channel) const { return rows % 32 == 0 && columns - channel >= kColumns; }
};

// Panels of 32 channels, made where they are used first and kept for later, two tiles `apart` panels from each other.
template <Storage storage, bool keeps>
struct PanelsOnTheWay {
  const char* rows[TurnedRows::kMost];  // at the first of the channels
  std::int64_t row_bytes[TurnedRows::kMost];
  Panel* panels;
  std::int64_t apart;

  void get(std::int64_t i, int j, P (&tiles)[2]) const {
    const std::int64_t bytes = row_bytes[i / 2];
    const char* from = rows[i / 2] + (i % 2 * 32 + 2 * j) * bytes;
    interleave(whole_pairs<storage>(from, 0), whole_pairs<storage>(from + bytes, 0), tiles[0], tiles[1]);
    if constexpr (keeps) {
      panels[i][j] = tiles[0];
      panels[apart + i][j] = tiles[1];
    }
  }
};

template <Storage storage, bool keeps>
inline PanelsOnTheWay<storage, keeps> panels_on_the_way(const TurnedRows& w, std::int64_t channel, Panel* panels) {
  PanelsOnTheWay<storage, keeps> made;
  for (int i = 0; i < w.count; ++i) {
    const Matrix& part = *w.parts[i];
    made.rows[i] = static_cast<const char*>(part.data) + channel * part.element_bytes();
    made.row_bytes[i] = part.stride * part.element_bytes();
  }
  made.panels = panels;
  made.apart = num_panels(w.rows);
  return made;
}

// The first few rows of activations turn the rows, the others find panels.
template <Storage storage, class Rows>
inline void turn_and_multiply(const TurnedRows& w, std::int64_t channel, Panel* panels, const Rows& x,
                              std::int64_t rows, float* out, std::int64_t out_stride, Ahead* ahead) {
  const std::int64_t count = num_panels(w.rows), few = even_block(rows, kTokens / 2);
  with_tokens<kTokens / 2>(few, [&]<int T>() {
    if (rows > few) {
      const auto made = panels_on_the_way<storage, true>(w, channel, panels);
      multiply_block<T, 2>(made, count, x, out, out_stride, true, ahead);
    } else {
      const auto made = panels_on_the_way<storage, false>(w, channel, panels);
      multiply_block<T, 2>(made, count, x, out, out_stride, true, ahead);
    }
  });
  multiply_by_dots(panels, 2, count, count, x.from(few), rows - few, out + few * out_stride, out_stride, true, ahead);
}

inline void turn_panels(const TurnedRows& w, std::int64_t channel, Panel* panels) {
  for (int i = 0; i < w.count; ++i) {
    Panel* to = panels + i * TurnedRows::kRows / kColumns;
    load_turned_panels(*w.parts[i], channel, 0, w.parts[i]->rows, to, num_panels(w.rows));
  }
}

// out[r][c] += sum over rows of w[row][channel + c] * x[r][row], c < 32, for all columns there are; `panels` has room
// for those of two tiles. Whole rows are turned where the first product needs them.
template <class Rows>
inline void multiply_turned_by_dots(const TurnedRows& w, std::int64_t channel, Panel* panels, const Rows& x,
                                    std::int64_t rows, float* out, std::int64_t out_stride, Ahead* ahead) {
  if (!w.is_whole(channel)) {
    const std::int64_t count = num_panels(w.rows);
    turn_panels(w, channel, panels);
    return multiply_by_dots(panels, 2, count, count, x, rows, out, out_stride, true, ahead);
  }
  if (w.parts[0]->storage == Storage::bf16) {
    return turn_and_multiply<Storage::bf16>(w, channel, panels, x, rows, out, out_stride, ahead);
  }
  turn_and_multiply<Storage::int8_rows>(w, channel, panels, x, rows, out, out_stride, ahead);
}

// The same for rows `stride` apart, by what the level multiplies with.
inline void multiply_turned_rows(const TurnedRows& w, std::int64_t channel, Panel* panels, const bf16* x,
                                 std::int64_t stride, std::int64_t rows, float* out, std::int64_t out_stride,
                                 Ahead* ahead) {
  if (kMultipliesByDots) {
    return multiply_turned_by_dots(w, channel, panels, PlainRows{x, stride}, rows, out, out_stride, ahead);
  }
  const std::int64_t count = num_panels(w.rows);
  turn_panels(w, channel, panels);
  multiply(panels, 2, count, count, x, stride, rows, out, out_stride, true, ahead);
}

}  // namespace lowlat::LOWLAT_ISA
