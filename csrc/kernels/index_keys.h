// Index keys of sparse attention (DSA) in the paged KV cache: tiles of 16 tokens in int8 (model.h).
#pragma once

#include "kv_cache.h"

namespace lowlat::LOWLAT_ISA {

inline std::int64_t index_quads(std::int64_t dim) { return (dim + 3) / 4; }

inline std::uint8_t* index_tile(const IndexCache& cache, const std::int32_t* pages, std::int64_t position) {
  const std::int64_t page = pages[position / cache.page_size];
  return cache.data + (page * cache.page_size + position % cache.page_size) / kTile * cache.tile_bytes;
}

// The scales of a tile's 16 keys.
inline const float* index_scales(const IndexCache& cache, const std::uint8_t* tile) {
  return reinterpret_cast<const float*>(tile + cache.tile_bytes) - kTile;
}

// Stores the key of the token at `slot`: one lane of its tile.
inline void store_index_key(const IndexCache& cache, const bf16* key, std::int64_t dim, std::int64_t slot) {
  constexpr std::int64_t kAtOnce = 64;
  std::uint8_t* lane = cache.data + slot / kTile * cache.tile_bytes + slot % kTile * 4;
  const float scale = int8_scale(key, dim);
  for (std::int64_t first = 0; first < dim; first += kAtOnce) {
    alignas(64) std::int8_t values[kAtOnce] = {};
    const std::int64_t count = least(kAtOnce, dim - first);
    round_to_int8(key + first, count, scale, values);
    for (std::int64_t i = 0; i < count; i += 4, lane += 64) {
      for (int byte = 0; byte < 4; ++byte) lane[byte] = static_cast<std::uint8_t>(values[i + byte] + 128);
    }
  }
  std::memcpy(lane, &scale, sizeof scale);
}

}  // namespace lowlat::LOWLAT_ISA
