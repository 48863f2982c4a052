// Linear layers: GEMM of activations with strips of 32 weight rows, for every weight storage.
//
// Every output is one chain of operations that depends only on its row of W and its row of x: bits do not depend on
// the number of activation rows, the number of threads, or the row's place in the batch.
#pragma once

#if defined(LOWLAT_AMX)
#include "gemm_amx.h"
#else
#include "gemv.h"
#endif
#include "gguf_gemv.h"

namespace lowlat::LOWLAT_ISA {

#if defined(LOWLAT_AMX)

constexpr bool kMultipliesByDots = false;  // multiply() uses tile registers

inline void multiply(const Panel* panels, std::int64_t tiles, std::int64_t tile_step, std::int64_t count, const bf16* x,
                     std::int64_t stride, std::int64_t rows, float* out, std::int64_t out_stride, bool adds,
                     Prefetcher* ahead = nullptr) {
  multiply_by_tiles(panels, tiles, tile_step, count, x, stride, rows, out, out_stride, adds, ahead);
}

inline void multiply_rows(const Matrix& w, std::int64_t first, std::int64_t last, NextTile next, const Activations& x,
                          Panel* panels, float* out, std::int64_t out_stride) {
  if (x.is_decode && w.storage == Storage::gguf) return gguf::gemv(w, first, last, next, x, out, out_stride);
  if (x.is_decode && w.is_tiled()) return gemv_tiles(w, first, last, next, x, panels, out, out_stride);
  if (x.is_decode && lies_in_tiles(w, first) && lies_in_tiles(w, last - 1)) {
    return gemv_by_tiles(w, first, last, next, x, panels, out, out_stride);
  }
  if (x.is_decode && w.storage != Storage::bf16) return gemv_rows(w, first, last, next, x, out, out_stride);
  row_panels.values = nullptr;  // other panels replace them
  multiply_rows_by_tiles(w, first, last, x, panels, out, out_stride);
}

#else

constexpr bool kMultipliesByDots = true;

inline void multiply(const Panel* panels, std::int64_t tiles, std::int64_t tile_step, std::int64_t count, const bf16* x,
                     std::int64_t stride, std::int64_t rows, float* out, std::int64_t out_stride, bool adds,
                     Prefetcher* ahead = nullptr) {
  multiply_by_dots(panels, tiles, tile_step, count, x, stride, rows, out, out_stride, adds, ahead);
}

inline void multiply_rows(const Matrix& w, std::int64_t first, std::int64_t last, NextTile next, const Activations& x,
                          Panel* panels, float* out, std::int64_t out_stride) {
  if (x.is_decode) {
    if (w.storage == Storage::gguf) return gguf::gemv(w, first, last, next, x, out, out_stride);
    if (w.is_tiled()) return gemv_tiles(w, first, last, next, x, panels, out, out_stride);
    return gemv_rows(w, first, last, next, x, out, out_stride);
  }
  if (x.rows > kTokens || w.storage == Storage::gguf) {
    const std::int64_t count = num_panels(w.columns);
    for (std::int64_t tile = first; tile < last; ++tile) load_panels(w, tile, panels + (tile - first) * count);
    return multiply_by_dots(panels, last - first, count, count, x.values, x.stride, x.rows, out, out_stride, false);
  }
  for (std::int64_t tile = first; tile < last; ++tile, out += kTile) {
    multiply_few(w, tile, tile + 1 < last ? NextTile{&w, tile + 1} : next, x, out, out_stride);
  }
}

// Discards a thread's packed activations of the last strips: the activations may have changed.
inline void discard_packed_rows() {
  gguf::forget_activations();
#if defined(LOWLAT_AVX512)
  split_store.forget();
#endif
}

struct ProductSession {
  ProductSession() { discard_packed_rows(); }
};

#endif

constexpr int kStrip = 32;  // weight rows per work item: two tiles

inline std::int64_t num_strips(const Matrix& w) { return (w.rows + kStrip - 1) / kStrip; }

// The first tile of the next strip, if this thread continues with it.
inline NextTile next_strip(const Matrix& w, std::int64_t strip, bool continues) {
  return continues && strip + 1 < num_strips(w) ? NextTile{&w, 2 * (strip + 1)} : NextTile{};
}

// Panels that multiply_strip() may need.
inline std::int64_t strip_panels(const Matrix& w) { return 2 * num_panels(w.columns); }

// Applies row scales to the products of a tile.
inline void scale_rows(const Matrix& w, std::int64_t tile, std::int64_t rows, float* out, std::int64_t out_stride) {
  if (!w.has_row_scales()) return;
  const F scale = load(static_cast<const float*>(w.scale) + tile * kTile, w.rows - tile * kTile);
  for (std::int64_t r = 0; r < rows; ++r) store(out + r * out_stride, mul(load(out + r * out_stride), scale));
}

inline bool is_zero(const Matrix& w, std::int64_t tile) { return w.occupied != nullptr && w.occupied[tile] == 0; }

// out[r][lane] = x[r] . w[32 strip + lane] for all rows of x; out [x.rows, 32]. `panels` holds strip_panels(w).
inline void multiply_strip(const Matrix& w, std::int64_t strip, const Activations& x, Panel* panels, float* out,
                           NextTile next = {}) {
  if (x.rows == 0) return;
  const std::int64_t first = 2 * strip, last = least(first + 2, w.tiles());
  if (!is_zero(w, first) && !is_zero(w, last - 1)) {
    multiply_rows(w, first, last, next, x, panels, out, kStrip);
  } else {
    for (std::int64_t tile = first; tile < last; ++tile) {
      float* to = out + (tile - first) * kTile;
      if (!is_zero(w, tile)) {
        multiply_rows(w, tile, tile + 1, next, x, panels, to, kStrip);
      } else {
        for (std::int64_t r = 0; r < x.rows; ++r) store(to + r * kStrip, zero());
      }
    }
  }
  for (std::int64_t tile = first; tile < last; ++tile) {
    scale_rows(w, tile, x.rows, out + (tile - first) * kTile, kStrip);
  }
}

}  // namespace lowlat::LOWLAT_ISA
