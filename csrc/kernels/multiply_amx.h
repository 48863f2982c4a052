// Products of activation rows with panels on AMX: a panel is a tile register's 16 rows of 64 bytes as it lies.
#pragma once

#include "multiply.h"

namespace lowlat::LOWLAT_ISA {

constexpr int kTileRows = 16;  // activation rows of a tile register

// The thread's tile registers: 0 to 3 sums (two blocks of rows by two tiles of weights), 4 and 5 rows, 6 and 7 weights.
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

// Sums start anew or where they are, and go back: one block of rows and one tile of weights.
#define LOWLAT_START_TILE(tile, at) \
  if (adds) {                       \
    _tile_loadd(tile, at, pitch);   \
  } else {                          \
    _tile_zero(tile);               \
  }

// out[r][16 k + lane] = sum over the panels of tile k, `tile_step` panels apart, of panel . x[r]; plus what is there if
// `adds`.
inline void multiply_by_tiles(const Panel* panels, std::int64_t tiles, std::int64_t tile_step, std::int64_t count, const bf16* x,
                     std::int64_t stride, std::int64_t rows, float* out, std::int64_t out_stride, bool adds) {
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

// Tiles [first, last) of y = x W^T. `panels` has room for these tiles.
inline void multiply_rows_by_tiles(const Matrix& w, std::int64_t first, std::int64_t last, const Activations& x,
                                   Panel* panels, float* out, std::int64_t out_stride) {
  const std::int64_t count = num_panels(w.columns);
  for (std::int64_t tile = first; tile < last; ++tile) {
    for (std::int64_t i = 0; i < count; ++i) {
      load_panel(w, tile, i, panels[(tile - first) * count + i]);
      prefetch_panel(w, tile + 1, i, true);
    }
  }
  multiply_by_tiles(panels, last - first, count, count, x.values, x.stride, x.rows, out, out_stride, false);
}

// Tile registers are set up anew by whoever uses them first, and given back at the end: their state is large to save.
struct ProductSession {
  ProductSession() { configured_rows = -1; }
  ~ProductSession() {
    if (configured_rows != -1) _tile_release();
    configured_rows = -1;
  }
  ProductSession(const ProductSession&) = delete;
  ProductSession& operator=(const ProductSession&) = delete;
};

}  // namespace lowlat::LOWLAT_ISA
