// GEMM packing: weights of every storage, dequantized and transposed into bf16 panels (the packed B of a GEMM).
#pragma once

#include <cstring>

#include "../matrix.h"
#include "common.h"
#if defined(LOWLAT_AVX512)
#include "gguf_tile_codebooks.h"
#else
#include "gguf_span.h"
#endif

namespace lowlat::LOWLAT_ISA {

constexpr int kTokens = 12;   // activation rows per block of accumulators (register tile)
constexpr int kColumns = 32;  // columns of a panel: 16 pairs

// Calls body.operator()<T>() for the run-time value of T in 1..most, and nothing for 0.
template <int most = kTokens, int T = 0, class Body>
inline void with_tokens(std::int64_t tokens, Body&& body) {
  if constexpr (T < most) {
    if (tokens != T) return with_tokens<most, T + 1>(tokens, body);
  }
  if constexpr (T > 0) body.template operator()<T>();
}

// Rows per block: as even as blocks of at most `most` rows allow.
inline std::int64_t even_block(std::int64_t rows, std::int64_t most = kTokens) {
  const std::int64_t blocks = (rows + most - 1) / most;
  return blocks == 0 ? 1 : (rows + blocks - 1) / blocks;
}

// A panel: 16 vectors, lane r of vector j is pair j of weight row r.
using Panel = P[16];

// The next tile, to be prefetched; none if w is null.
struct NextTile {
  const Matrix* w = nullptr;
  std::int64_t tile = 0;
};

// The scales of a row of fp8, one per 128 columns.
inline const float* row_scales(const Matrix& w, std::int64_t row) {
  return static_cast<const float*>(w.scale) + (w.first_row + row) / 128 * ((w.columns + 127) / 128);
}

// Columns [column, column + 32) of a row as bf16 pairs; zero beyond the last column.
inline P row_pairs(const Matrix& w, std::int64_t row, std::int64_t column) {
  const std::int64_t count = least(kColumns, w.columns - column);
  const std::int64_t at = row * w.stride + column;
  if (w.storage == Storage::bf16) return load_pairs(static_cast<const bf16*>(w.data) + at, count);
  alignas(64) std::uint8_t edge[kColumns] = {};
  const std::uint8_t* bytes = static_cast<const std::uint8_t*>(w.data) + at;
  if (count < kColumns) {
    std::memcpy(edge, bytes, count);
    bytes = edge;
  }
  if (w.storage == Storage::int8_rows) return pairs_of_int8(reinterpret_cast<const std::int8_t*>(bytes));
  if (w.storage == Storage::fp8_rows) return pairs_of_fp8(bytes);
  return pairs_of_fp8(bytes, row_scales(w, row)[column / 128]);
}

// Columns [column, column + 32) of a tile of row-major weights.
inline void transpose_panel(const Matrix& w, std::int64_t tile, std::int64_t column, Panel& panel) {
  const std::int64_t row = tile * kTile;
  const std::int64_t rows = least(kTile, w.rows - row);
  const bool is_whole = rows == kTile && w.columns - column >= kColumns;
  if (is_whole && w.storage == Storage::bf16) {
    const bf16* base = static_cast<const bf16*>(w.data) + row * w.stride + column;
    for (int r = 0; r < kTile; ++r) panel[r] = pairs(base + r * w.stride);
  } else if (is_whole && w.storage == Storage::int8_rows) {
    const std::int8_t* base = static_cast<const std::int8_t*>(w.data) + row * w.stride + column;
    for (int r = 0; r < kTile; ++r) panel[r] = pairs_of_int8(base + r * w.stride);
  } else {
    for (int r = 0; r < kTile; ++r) panel[r] = r < rows ? row_pairs(w, row + r, column) : zero_pairs();
  }
  transpose(panel, panel);
}

// Group `group` of a tile of int8.
inline void load_int8_panel(const Matrix& w, std::int64_t tile, std::int64_t group, Panel& panel) {
  const std::int64_t at = tile * w.groups() + group;
  const auto* data = static_cast<const std::uint8_t*>(w.data) + at * w.group_bytes();
  const F scale = load_fp16(static_cast<const fp16*>(w.scale) + at * kTile), middle = set1(128.0f);
  const auto weights = [&](F even, F odd) { return pairs_of(mul(sub(even, middle), scale), mul(sub(odd, middle), scale)); };
  for (int step = 0; step < 8; ++step) {
    const P bytes = pairs(data + 64 * step);
    panel[2 * step] = weights(field<0, 255>(bytes), field<16, 255>(bytes));
    panel[2 * step + 1] = weights(field<8, 255>(bytes), field<24, 255>(bytes));
  }
}

// Group `group` of a tile of int4.
inline void load_int4_panel(const Matrix& w, std::int64_t tile, std::int64_t group, Panel& panel) {
  const std::int64_t at = tile * w.groups() + group;
  const auto* data = static_cast<const std::uint8_t*>(w.data) + at * w.group_bytes();
  const F scale = load_fp16(static_cast<const fp16*>(w.scale) + at * kTile);
  const F minimum = load_fp16(static_cast<const fp16*>(w.minimum) + at * kTile);
  const auto weights = [&](F even, F odd) { return pairs_of(fma(even, scale, minimum), fma(odd, scale, minimum)); };
  for (int step = 0; step < 4; ++step) {
    const P bytes = pairs(data + 64 * step);
    panel[4 * step] = weights(field<0, 15>(bytes), field<16, 15>(bytes));
    panel[4 * step + 1] = weights(field<4, 15>(bytes), field<20, 15>(bytes));
    panel[4 * step + 2] = weights(field<8, 15>(bytes), field<24, 15>(bytes));
    panel[4 * step + 3] = weights(field<12, 15>(bytes), field<28, 15>(bytes));
  }
}

// Columns [32 i, 32 i + 32) of a tile.
inline void load_panel(const Matrix& w, std::int64_t tile, std::int64_t i, Panel& panel) {
  if (w.storage == Storage::int8) return load_int8_panel(w, tile, i, panel);
  if (w.storage == Storage::int4) return load_int4_panel(w, tile, i, panel);
  transpose_panel(w, tile, i * kColumns, panel);
}

inline std::int64_t num_panels(std::int64_t columns) { return (columns + kColumns - 1) / kColumns; }

// Prefetches the source of panel i of a tile, into the second-level cache if `far`.
inline void prefetch_panel(const Matrix& w, std::int64_t tile, std::int64_t i, bool far) {
  if (w.is_tiled()) {
    if (tile >= w.tiles()) return;
    const char* at = static_cast<const char*>(w.data) + (tile * w.groups() + i) * w.group_bytes();
    for (std::int64_t b = 0; b < w.group_bytes(); b += 64) far ? prefetch_far(at + b) : prefetch(at + b);
    return;
  }
  if ((tile + 1) * kTile > w.rows) return;
  const std::int64_t row_bytes = w.stride * w.element_bytes();
  const char* at = static_cast<const char*>(w.data) + tile * kTile * row_bytes + i * kColumns * w.element_bytes();
  for (int r = 0; r < kTile; ++r) far ? prefetch_far(at + r * row_bytes) : prefetch(at + r * row_bytes);
}

// Bytes from a tile of a matrix in GGUF blocks to the tile that follows it; 0 if none does.
inline std::int64_t distance_ahead(const Matrix& w, std::int64_t tile, NextTile next) {
  if (next.w == nullptr || next.tile >= next.w->tiles()) return 0;
  const auto start = [](const Matrix& m, std::int64_t number) {
    if (m.is_tiled()) return m.tile_data(number);
    return static_cast<const std::uint8_t*>(m.data) + number * kTile * m.stride * m.element_bytes();
  };
  return start(*next.w, next.tile) - start(w, tile);
}

// Prefetches a row-major matrix, or bytes, a few cache lines at a time while something else is computed: many at once
// would stall that computation's loads.
class Prefetcher {
 public:
  Prefetcher() = default;
  explicit Prefetcher(const Matrix& w)
      : at_(static_cast<const char*>(w.data)),
        rows_(w.rows),
        bytes_(w.columns * w.element_bytes()),
        gap_((w.stride - w.columns) * w.element_bytes()) {
    if (gap_ == 0) {
      bytes_ *= rows_;
      rows_ = 1;
    }
    end_ = rows_ > 0 ? at_ + bytes_ : at_;
  }
  Prefetcher(const void* data, std::int64_t bytes) : at_(static_cast<const char*>(data)), end_(at_ + bytes) {}

  void ask(int lines) {
    while (lines > 0 && has_line()) {
      const std::int64_t here = (end_ - at_ + 63) / 64;
      const char* stop = at_ + 64 * (here < lines ? here : lines);
      lines -= static_cast<int>((stop - at_) / 64);
      for (; at_ < stop; at_ += 64) prefetch_far(at_);
    }
  }

  // All lines at once, for memory that is read next.
  void ask_for_all() {
    for (; has_line(); at_ += 64) prefetch_far(at_);
  }

 private:
  bool has_line() {
    if (at_ < end_) return true;
    if (rows_ <= 1) return false;
    --rows_;
    at_ = end_ + gap_;
    end_ = at_ + bytes_;
    return true;
  }

  const char* at_ = nullptr;
  const char* end_ = nullptr;
  std::int64_t rows_ = 0, bytes_ = 0, gap_ = 0;
};

// All panels of a tile of GGUF blocks of a type.
template <GgufType type>
inline void load_gguf_panels(const Matrix& w, std::int64_t tile, Panel* panels) {
  const std::int64_t count = num_panels(w.columns), rows = least(kTile, w.rows - tile * kTile);
  for (std::int64_t r = 0; r < kTile; ++r) {
    if (r >= rows) {
      for (std::int64_t i = 0; i < count; ++i) panels[i][r] = zero_pairs();
      continue;
    }
    F first = zero();
    gguf::each_finite_sixteen<type>(w, tile * kTile + r, [&](std::int64_t column, F weights) {
      if (column % kColumns == 0) {
        first = weights;
      } else {
        panels[column / kColumns][r] = pairs_in_order(first, weights);
      }
    });
  }
  for (std::int64_t i = 0; i < count; ++i) transpose(panels[i], panels[i]);
}

#if defined(LOWLAT_AVX512)

// The columns from `column` of a part of an interleaved GGUF block.
template <class Decoder>
LOWLAT_INLINE inline void load_part_panels(Decoder& decoder, std::int64_t column, Panel* panels) {
  LOWLAT_UNROLL
  for (int g = 0; g < Decoder::kGroups; ++g) {
    const std::int64_t first = column + g * Decoder::kGroup;
    P* panel = panels[first / kColumns] + first % kColumns / 2;
    const F scale = decoder.scale(g);
    const auto weights = [&](F code) LOWLAT_INLINE {
      const F product = mul(sub(code, set1(Decoder::kZero)), scale);
      if constexpr (Decoder::kHasMinimum) return sub(product, decoder.minimum(g));
      return product;
    };
    if constexpr (gguf::kHasWordsOfEights<Decoder>) {
      decoder.load_group(g);
      LOWLAT_UNROLL
      for (int i = 0; i < 8; i += 2) {
        const P even = {decoder.word(g, i)}, odd = {decoder.word(g, i + 1)};
        panel[i / 2] = pairs_of(weights(field<0, 255>(even)), weights(field<0, 255>(odd)));
        panel[4 + i / 2] = pairs_of(weights(field<8, 255>(even)), weights(field<8, 255>(odd)));
        panel[8 + i / 2] = pairs_of(weights(field<16, 255>(even)), weights(field<16, 255>(odd)));
        panel[12 + i / 2] = pairs_of(weights(field<24, 255>(even)), weights(field<24, 255>(odd)));
      }
      continue;
    }
    LOWLAT_UNROLL
    for (int i = 0; i < Decoder::kGroup / 4; ++i) {
      const P code = {decoder.word(g, i)};
      panel[2 * i] = pairs_of(weights(field<0, 255>(code)), weights(field<8, 255>(code)));
      panel[2 * i + 1] = pairs_of(weights(field<16, 255>(code)), weights(field<24, 255>(code)));
    }
  }
}

// All panels of a tile of interleaved GGUF blocks.
template <GgufType type>
inline void load_interleaved_panels(const Matrix& w, std::int64_t tile, Panel* panels) {
  using Decoder = gguf::TileDecoder<type>;
  constexpr const GgufTypeInfo& info = *find_gguf_type(static_cast<std::int64_t>(type));
  const std::uint8_t* at = static_cast<const std::uint8_t*>(w.data) + tile * kTile * w.stride;
  for (std::int64_t column = 0; column < w.columns; column += info.columns, at += kTile * info.bytes) {
    Decoder decoder(at);
    if constexpr (Decoder::kParts == 1) {
      load_part_panels(decoder, column, panels);
    } else {
      for (decoder.part = 0; decoder.part < Decoder::kParts; ++decoder.part) {
        load_part_panels(decoder, column + decoder.part * Decoder::kGroups * Decoder::kGroup, panels);
      }
    }
  }
}

#endif

inline void load_block_panels(const Matrix& w, std::int64_t tile, Panel* panels) {
  with_gguf_type(w.type, [&]<GgufType type>() {
#if defined(LOWLAT_AVX512)
    if constexpr (can_interleave(type)) {
      if (w.is_interleaved) return load_interleaved_panels<type>(w, tile, panels);
    }
#endif
    load_gguf_panels<type>(w, tile, panels);
  });
}

// All panels of a tile; meanwhile the same tile of `ahead`, if any, is prefetched.
inline void load_panels(const Matrix& w, std::int64_t tile, Panel* panels, const Matrix* ahead = nullptr) {
  if (w.storage == Storage::gguf) {
    return load_block_panels(w, tile, panels);
  }
  for (std::int64_t i = 0; i < num_panels(w.columns); ++i) {
    load_panel(w, tile, i, panels[i]);
    if (ahead != nullptr) prefetch_panel(*ahead, tile, i, true);
  }
}

// The rows of a tile from its panels, which are transposed in place.
inline void store_panels(Panel* panels, std::int64_t count, std::int64_t rows, bf16* to, std::int64_t stride) {
  for (std::int64_t i = 0; i < count; ++i) {
    transpose(panels[i], panels[i]);
    for (std::int64_t r = 0; r < rows; ++r) store_pairs(to + r * stride + i * kColumns, panels[i][r]);
  }
}

// Prefetches the columns of a row from `column`.
inline void prefetch_row(const Matrix& w, std::int64_t row, std::int64_t column) {
  if (column >= w.columns) return;
  prefetch(static_cast<const char*>(w.data) + (row * w.stride + column) * w.element_bytes());
}

// 32 columns of a row of bf16 or int8_rows, no partial vector.
template <Storage storage>
inline P whole_pairs(const char* row, std::int64_t column) {
  if constexpr (storage == Storage::bf16) return pairs(reinterpret_cast<const bf16*>(row) + column);
  return pairs_of_int8(reinterpret_cast<const std::int8_t*>(row) + column);
}

// Panels of two adjacent blocks of 16 channels against 32 rows from `row`, all whole.
template <Storage storage>
inline void transpose_rows(const Matrix& w, std::int64_t channel, std::int64_t row, Panel& first, Panel& second,
                      bool reads_on) {
  const std::int64_t row_bytes = w.stride * w.element_bytes();
  const char* base = static_cast<const char*>(w.data) + row * row_bytes;
  for (int j = 0; j < 16; ++j, base += 2 * row_bytes) {
    if (reads_on) {
      prefetch_row(w, row + 2 * j, channel + kColumns);
      prefetch_row(w, row + 2 * j + 1, channel + kColumns);
    }
    const P even = whole_pairs<storage>(base, channel), odd = whole_pairs<storage>(base + row_bytes, channel);
    interleave(even, odd, first[j], second[j]);
  }
}

// Panels of W^T: 16 channels (columns of W) against all its rows in pairs. Two adjacent blocks are packed at once,
// because 32 bf16 channels are one cache line: panel i of channel block b is panels[b * apart + i]. `reads_on`:
// prefetch the next 32 channels.
inline void load_transposed_panels(const Matrix& w, std::int64_t first_channel, std::int64_t first_row, std::int64_t rows,
                               Panel* panels, std::int64_t apart, bool reads_on = false) {
  const std::int64_t count = num_panels(rows);
  const bool is_whole = w.columns - first_channel >= kColumns;
  for (std::int64_t i = 0; i < count; ++i) {
    if (is_whole && (i + 1) * 32 <= rows && w.storage == Storage::bf16) {
      transpose_rows<Storage::bf16>(w, first_channel, first_row + i * 32, panels[i], panels[apart + i], reads_on);
      continue;
    }
    if (is_whole && (i + 1) * 32 <= rows && w.storage == Storage::int8_rows) {
      transpose_rows<Storage::int8_rows>(w, first_channel, first_row + i * 32, panels[i], panels[apart + i], reads_on);
      continue;
    }
    for (int j = 0; j < 16; ++j) {
      const std::int64_t row = i * 32 + 2 * j;
      if (reads_on && row + 1 < rows) {
        prefetch_row(w, first_row + row, first_channel + kColumns);
        prefetch_row(w, first_row + row + 1, first_channel + kColumns);
      }
      const P a = row < rows ? row_pairs(w, first_row + row, first_channel) : zero_pairs();
      const P b = row + 1 < rows ? row_pairs(w, first_row + row + 1, first_channel) : zero_pairs();
      interleave(a, b, panels[i][j], panels[apart + i][j]);
    }
  }
}

}  // namespace lowlat::LOWLAT_ISA
