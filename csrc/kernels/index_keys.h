// Index keys of sparse attention (DSA) in the paged KV cache: tiles of 16 tokens, bf16 or int8 (model.h).
#pragma once

#include "kv_cache.h"

namespace lowlat::LOWLAT_ISA {

constexpr std::int64_t kIndexScaled = 64;  // channels of an int8 key that share a scale

inline std::int64_t index_quads(std::int64_t dim) { return (dim + 3) / 4; }
inline std::int64_t index_scales(std::int64_t dim) { return (dim + kIndexScaled - 1) / kIndexScaled; }

inline std::uint8_t* index_tile(const IndexCache& cache, const std::int32_t* pages, std::int64_t position) {
  const std::int64_t page = pages[position / cache.page_size];
  return cache.data + (page * cache.page_size + position % cache.page_size) / kTile * cache.tile_bytes;
}

// Stores the key of the token at `slot`: one lane of its tile.
inline void store_index_key(const IndexCache& cache, const bf16* key, std::int64_t dim, std::int64_t slot) {
  std::uint8_t* lane = cache.data + slot / kTile * cache.tile_bytes + slot % kTile * 4;
  if (!cache.is_int8) {
    for (std::int64_t i = 0; i < dim; i += 2, lane += 64) std::memcpy(lane, key + i, 4);
    return;
  }
  std::uint8_t* scales = lane + 64 * index_quads(dim);
  for (std::int64_t first = 0; first < dim; first += kIndexScaled, scales += 64) {
    alignas(64) std::int8_t values[kIndexScaled] = {};
    const std::int64_t count = least(kIndexScaled, dim - first);
    const float scale = round_to_int8(key + first, count, values);
    std::memcpy(scales, &scale, sizeof scale);
    for (std::int64_t i = 0; i < count; i += 4, lane += 64) {
      for (int byte = 0; byte < 4; ++byte) lane[byte] = static_cast<std::uint8_t>(values[i + byte] + 128);
    }
  }
}

// The bf16 panels of a tile, dequantized or zero-padded to whole panels: out [num_panels(dim)].
inline void copy_index_tile(const IndexCache& cache, const std::uint8_t* tile, std::int64_t dim, Panel* out) {
  const std::int64_t vectors = num_panels(dim) * kColumns / 2;
  P* to = out[0];
  if (!cache.is_int8) {
    for (std::int64_t i = 0; i < vectors; ++i) to[i] = 2 * i < dim ? pairs(tile + 64 * i) : zero_pairs();
    return;
  }
  const auto* scales = reinterpret_cast<const float*>(tile + 64 * index_quads(dim));
  const F middle = set1(128.0f);
  for (std::int64_t i = 0; i < vectors / 2; ++i) {
    if (4 * i >= dim) {
      to[2 * i] = to[2 * i + 1] = zero_pairs();
      continue;
    }
    const P four = pairs(tile + 64 * i);
    const F scale = load(scales + 4 * i / kIndexScaled * kTile);
    const auto keys = [&](F even, F odd) { return pairs_of(mul(sub(even, middle), scale), mul(sub(odd, middle), scale)); };
    to[2 * i] = keys(field<0, 255>(four), field<8, 255>(four));
    to[2 * i + 1] = keys(field<16, 255>(four), field<24, 255>(four));
  }
}

}  // namespace lowlat::LOWLAT_ISA
