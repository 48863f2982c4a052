// AMX tile kernels: GEMM with TDPBF16PS. A packed panel is, byte for byte, a tile register of 16 rows of 64 bytes.
#pragma once

#include "gemv.h"
#include "gguf_activations.h"

namespace lowlat::LOWLAT_ISA {

constexpr int kTileRows = 16;  // activation rows of a tile register
constexpr int kLinesOfTiles = 24;  // cache lines prefetched per column of tiles

// Tile register allocation: 0 to 3 sums (two blocks of rows by two weight tiles), 4 and 5 activations, 6 and 7
// weights.
inline thread_local int configured_rows = -1;

inline void configure_tiles(int first_rows, int second_rows) {
  const int wanted = first_rows * 32 + second_rows;
  if (configured_rows == wanted) return;
  struct alignas(64) Config {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t bytes[16] = {};
    std::uint8_t rows[16] = {};
  } config;
  const int rows[8] = {first_rows, first_rows, second_rows, second_rows, first_rows, second_rows, 16, 16};
  for (int i = 0; i < 8; ++i) {
    config.rows[i] = static_cast<std::uint8_t>(rows[i] > 0 ? rows[i] : 1);
    config.bytes[i] = 64;
  }
  _tile_loadconfig(&config);
  configured_rows = wanted;
}

// Zeroes or loads the accumulators and stores them: one block of rows and one weight tile.
#define LOWLAT_START_TILE(tile, at) \
  if (adds) {                       \
    _tile_loadd(tile, at, pitch);   \
  } else {                          \
    _tile_zero(tile);               \
  }

// out[r][16 k + lane] = sum over the panels of tile k, `tile_step` panels apart, of panel . x[r]; `adds` accumulates.
inline void multiply_by_tiles(const Panel* panels, std::int64_t tiles, std::int64_t tile_step, std::int64_t count, const bf16* x,
                     std::int64_t stride, std::int64_t rows, float* out, std::int64_t out_stride, bool adds,
                     Prefetcher* ahead = nullptr) {
  const auto x_pitch = static_cast<long>(stride * sizeof(bf16)), pitch = static_cast<long>(out_stride * sizeof(float));
  for (std::int64_t tile = 0; tile < tiles; tile += 2) {
    const bool has_two = tile + 1 < tiles;
    const Panel* left = panels + tile * tile_step;
    const Panel* right = left + tile_step;
    for (std::int64_t row = 0; row < rows; row += 2 * kTileRows) {
      const int first_rows = static_cast<int>(least(kTileRows, rows - row));
      const int second_rows = static_cast<int>(most(0, least(kTileRows, rows - row - kTileRows)));
      configure_tiles(first_rows, second_rows);
      const bf16* a = x + row * stride;
      const bf16* b = a + kTileRows * stride;
      float* top = out + row * out_stride + tile * kTile;
      float* bottom = top + kTileRows * out_stride;
      LOWLAT_START_TILE(0, top)
      if (has_two) {
        LOWLAT_START_TILE(1, top + kTile)
      }
      if (second_rows > 0) {
        LOWLAT_START_TILE(2, bottom)
        if (has_two) {
          LOWLAT_START_TILE(3, bottom + kTile)
        }
      }
      for (std::int64_t i = 0; i < count; ++i) {
        if (ahead != nullptr) ahead->ask(kLinesOfTiles);
        _tile_loadd(4, a + i * kColumns, x_pitch);
        _tile_loadd(6, left + i, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (has_two) {
          _tile_loadd(7, right + i, 64);
          _tile_dpbf16ps(1, 4, 7);
        }
        if (second_rows > 0) {
          _tile_loadd(5, b + i * kColumns, x_pitch);
          _tile_dpbf16ps(2, 5, 6);
          if (has_two) _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_stored(0, top, pitch);
      if (has_two) _tile_stored(1, top + kTile, pitch);
      if (second_rows > 0) {
        _tile_stored(2, bottom, pitch);
        if (has_two) _tile_stored(3, bottom + kTile, pitch);
      }
    }
  }
}

#undef LOWLAT_START_TILE

// Tiles [first, last) of y = x W^T. `panels` holds these tiles.
inline void multiply_rows_by_tiles(const Matrix& w, std::int64_t first, std::int64_t last, const Activations& x,
                                   Panel* panels, float* out, std::int64_t out_stride) {
  const std::int64_t count = num_panels(w.columns);
  for (std::int64_t tile = first; tile < last; ++tile) {
    if (w.storage == Storage::gguf) {
      load_panels(w, tile, panels + (tile - first) * count);
      continue;
    }
    for (std::int64_t i = 0; i < count; ++i) {
      load_panel(w, tile, i, panels[(tile - first) * count + i]);
      prefetch_panel(w, tile + 1, i, true);
    }
  }
  multiply_by_tiles(panels, last - first, count, count, x.values, x.stride, x.rows, out, out_stride, false);
}

// --- GEMV path -------------------------------------------------------------------------------------------------------

// Row-major bf16 weights load directly into tile registers with the activations packed as panels, so nothing is
// transposed between memory and product. The sums are those of multiply_by_tiles() with operands swapped: same bits.

constexpr std::int64_t kFewRows = 4;  // activation rows that are packed one by one

inline bool lies_in_tiles(const Matrix& w, std::int64_t tile) {
  return w.storage == Storage::bf16 && w.columns % kColumns == 0 && (tile + 1) * kTile <= w.rows;
}

// A thread's packed activations: made once for all consecutive strips.
struct RowPanels {
  const bf16* values = nullptr;
  std::int64_t rows = 0, columns = 0;
};
inline thread_local RowPanels row_panels;

// Discards a thread's packed activations of the last strips: the activations may have changed.
inline void discard_packed_rows() {
  row_panels.values = nullptr;
  split_store.forget();
  gguf::forget_activations();
}

// Packs a block of up to 16 rows as the other operand: `width` words of 4 bytes per pair of columns, one per row.
inline std::int64_t block_width(std::int64_t rows) { return rows <= kFewRows ? rows : kTile; }

inline void fill_row_panels(const Activations& x, std::int64_t columns, Panel* panels) {
  const std::int64_t count = num_panels(columns);
  if (x.rows == 1) {
    std::memcpy(panels, x.values, columns * sizeof(bf16));
    return;
  }
  for (std::int64_t row = 0; row < x.rows; row += kTile, panels += count) {
    const std::int64_t rows = least(kTile, x.rows - row), width = block_width(x.rows);
    const bf16* from = x.values + row * x.stride;
    if (width == kTile) {
      for (std::int64_t i = 0; i < count; ++i) {
        for (int r = 0; r < kTile; ++r) panels[i][r] = r < rows ? pairs(from + r * x.stride + i * kColumns) : zero_pairs();
        transpose(panels[i], panels[i]);
      }
    } else {
      auto* words = reinterpret_cast<std::uint32_t*>(panels);
      for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t pair = 0; pair < count * 16; ++pair) {
          words[pair * width + r] = word_at(from + r * x.stride + 2 * pair);
        }
      }
    }
  }
}

inline void configure_gemv(std::int64_t width) {
  const int wanted = 1000 + static_cast<int>(width);
  if (configured_rows == wanted) return;
  struct alignas(64) Config {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t bytes[16] = {};
    std::uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; ++i) {
    config.rows[i] = kTile;
    config.bytes[i] = static_cast<std::uint16_t>(i == 6 ? 64 : 4 * width);
  }
  _tile_loadconfig(&config);
  configured_rows = wanted;
}

// out[r][lane] from sums [lane][width].
inline void transpose_sums(const float* sums, std::int64_t width, std::int64_t rows, float* out, std::int64_t out_stride) {
  if (width == kTile) {
    Panel transposed;
    for (int lane = 0; lane < kTile; ++lane) transposed[lane] = pairs(sums + lane * kTile);
    transpose(transposed, transposed);
    for (std::int64_t r = 0; r < rows; ++r) std::memcpy(out + r * out_stride, &transposed[r], sizeof(P));
    return;
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    for (int lane = 0; lane < kTile; ++lane) out[r * out_stride + lane] = sums[lane * width + r];
  }
}

// One weight tile and at most 32 rows, packed in `panels`: two blocks of 16.
inline void multiply_tile_rows(const Matrix& w, std::int64_t tile, NextTile next, const Panel* panels, std::int64_t rows,
                               float* out, std::int64_t out_stride) {
  const std::int64_t count = num_panels(w.columns), width = block_width(rows);
  const bf16* weights = static_cast<const bf16*>(w.data) + tile * kTile * w.stride;
  const auto pitch = static_cast<long>(w.stride * sizeof(bf16)), row_pitch = static_cast<long>(4 * width);
  const char* left = reinterpret_cast<const char*>(panels);
  const char* right = reinterpret_cast<const char*>(panels + count);
  const std::int64_t panel_bytes = 64 * width;
  configure_gemv(width);
  _tile_zero(0);
  _tile_zero(1);
  for (std::int64_t i = 0; i < count; ++i) {
    _tile_loadd(6, weights + i * kColumns, pitch);
    _tile_loadd(4, left + i * panel_bytes, row_pitch);
    _tile_dpbf16ps(0, 6, 4);
    if (rows > kTile) {
      _tile_loadd(5, right + i * panel_bytes, row_pitch);
      _tile_dpbf16ps(1, 6, 5);
    }
    if (next.w != nullptr) prefetch_panel(*next.w, next.tile, i, false);
  }
  alignas(64) float sums[kTile * kTile];
  _tile_stored(0, sums, row_pitch);
  transpose_sums(sums, width, least(rows, kTile), out, out_stride);
  if (rows > kTile) {
    _tile_stored(1, sums, row_pitch);
    transpose_sums(sums, width, rows - kTile, out + kTile * out_stride, out_stride);
  }
}

// Tiles [first, last), all of which are whole. `panels` holds two blocks of rows.
inline void gemv_by_tiles(const Matrix& w, std::int64_t first, std::int64_t last, NextTile next,
                                     const Activations& x, Panel* panels, float* out, std::int64_t out_stride) {
  for (std::int64_t row = 0; row < x.rows; row += 2 * kTile) {
    Activations part = x.from(row);
    part.rows = least(2 * kTile, part.rows);
    const bool is_known = row_panels.values == part.values && row_panels.rows == part.rows && row_panels.columns == w.columns;
    if (!is_known) fill_row_panels(part, w.columns, panels);
    row_panels = {part.values, part.rows, w.columns};
    for (std::int64_t tile = first; tile < last; ++tile) {
      multiply_tile_rows(w, tile, tile + 1 < last ? NextTile{&w, tile + 1} : next, panels, part.rows,
                         out + row * out_stride + (tile - first) * kTile, out_stride);
    }
  }
}

// Tile registers are configured on first use and released at the end: their state is expensive to save at a context
// switch.
struct ProductSession {
  ProductSession() {
    configured_rows = -1;
    discard_packed_rows();
  }
  ~ProductSession() {
    if (configured_rows != -1) _tile_release();
    configured_rows = -1;
  }
  ProductSession(const ProductSession&) = delete;
  ProductSession& operator=(const ProductSession&) = delete;
};

}  // namespace lowlat::LOWLAT_ISA
