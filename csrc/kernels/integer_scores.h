// Attention scores over int8 KV cache entries by integer dot products (VNNI).
//
// A query is rounded to int8 in the cache's groups of 64 channels with one scale each; bf16 channels of an entry stay
// bf16.
#pragma once

#include "kv_cache.h"

namespace lowlat::LOWLAT_ISA {

#if defined(LOWLAT_AVX512)

constexpr int kScaled = 64;  // channels that share a scale
constexpr int kQuads = kScaled / 4;

// Queries in tiles of 16 rows: lane r of a vector holds row r.
struct IntegerQueries {
  Panel* integers;       // [tiles, groups]: vector j of a panel holds channels 4j to 4j + 3 as int8
  float* scales;         // [tiles, groups, 16]
  std::int32_t* starts;  // [tiles, groups, 16]: corrects for the 128 added to every key byte (unsigned operand)
  Panel* rest;           // [tiles, panels of the bf16 channels]
  std::int64_t tiles, groups, quads, rest_panels;
};

// Up to 64 consecutive cached entries, `row_bytes` apart.
struct IntegerBlock {
  std::int64_t count, row_bytes;
  const std::uint8_t* keys;  // the first entry's int8 channels that are keys
  const std::uint8_t* values;
  const float* key_scales;  // [groups, 64], 0 for missing entries
  const float* value_scales;
  const bf16* rest;  // the keys' bf16 channels: [64, 32 times their panels]
};

// The rows of q [rows, stride]: `integers` channels are quantized, `rest` bf16 channels follow.
inline void round_queries(const bf16* q, std::int64_t stride, std::int64_t rows, std::int64_t integers,
                          std::int64_t rest, const IntegerQueries& out) {
  for (std::int64_t tile = 0; tile < out.tiles; ++tile) {
    const std::int64_t count = least(kTile, rows - tile * kTile);
    for (std::int64_t g = 0; g < out.groups; ++g) {
      const std::int64_t at = tile * out.groups + g, channels = least(kScaled, integers - g * kScaled);
      alignas(64) std::int8_t bytes[kTile][kScaled] = {};
      for (std::int64_t r = 0; r < kTile; ++r) {
        const bf16* row = q + (tile * kTile + r) * stride + g * kScaled;
        const float scale = r < count ? round_to_int8(row, channels, bytes[r]) : 0.0f;
        std::int32_t sum = 0;
        for (int i = 0; i < kScaled; ++i) sum += bytes[r][i];
        out.scales[at * kTile + r] = scale;
        out.starts[at * kTile + r] = -128 * sum;
      }
      Panel& panel = out.integers[at];
      for (int r = 0; r < kTile; ++r) panel[r] = pairs(bytes[r]);
      transpose(panel, panel);
    }
    const Matrix plain = view(q + integers, rows, rest, stride);
    for (std::int64_t i = 0; i < out.rest_panels; ++i) {
      load_panel(plain, tile, i, out.rest[tile * out.rest_panels + i]);
    }
  }
}

// Scales of `count` entries from `from`, by group: out [groups, 64], 0 for missing entries.
inline void gather_scales(const std::uint8_t* from, std::int64_t row_bytes, std::int64_t count, std::int64_t groups,
                          float* out) {
  for (std::int64_t r = 0; r < count; ++r, from += row_bytes) {
    for (std::int64_t g = 0; g < groups; ++g) std::memcpy(out + g * kKeyBlock + r, from + 4 * g, sizeof(float));
  }
  for (std::int64_t g = 0; g < groups; ++g) {
    std::memset(out + g * kKeyBlock + count, 0, (kKeyBlock - count) * sizeof(float));
  }
}

// bf16 channels of `count` entries: out [rows, 32 times their panels], zero-padded.
inline void gather_rest(const std::uint8_t* from, std::int64_t row_bytes, std::int64_t count, std::int64_t channels,
                        bf16* out) {
  for (std::int64_t r = 0; r < count; ++r, from += row_bytes) {
    const auto* row = reinterpret_cast<const bf16*>(from);
    for (std::int64_t i = 0; i < channels; i += kColumns, out += kColumns) {
      store_pairs(out, load_pairs(row + i, channels - i));
    }
  }
}

// Scores of T keys from `key` with a tile of queries, 16 per key: out [T, out_stride].
template <int T>
inline void score_keys(const IntegerQueries& q, std::int64_t tile, const IntegerBlock& block, std::int64_t key,
                       std::int64_t rest_stride, float* out, std::int64_t out_stride, Prefetcher& ahead) {
  F sums[T], odd[T];
  LOWLAT_UNROLL
  for (int t = 0; t < T; ++t) sums[t] = odd[t] = zero();
  const bf16* rest = block.rest + key * rest_stride;
  for (std::int64_t i = 0; i < q.rest_panels; ++i) {
    dot_panel<T>(q.rest[tile * q.rest_panels + i], rest + i * kColumns, rest_stride, sums, odd);
  }
  LOWLAT_UNROLL
  for (int t = 0; t < T; ++t) sums[t] = add(sums[t], odd[t]);
  for (std::int64_t g = 0; g < q.groups; ++g) {
    const std::int64_t at = tile * q.groups + g;
    const Panel& panel = q.integers[at];
    const std::uint8_t* keys = block.keys + key * block.row_bytes + g * kScaled;
    const int quads = static_cast<int>(least(kQuads, q.quads - g * kQuads));
    ahead.ask(kLinesAhead);
    P integers[T];
    LOWLAT_UNROLL
    for (int t = 0; t < T; ++t) integers[t] = pairs(q.starts + at * kTile);
    for (int j = 0; j < quads; ++j) {
      LOWLAT_UNROLL
      for (int t = 0; t < T; ++t) {
        const P four = plus_128(set1_pair(word_at(keys + t * block.row_bytes + 4 * j)));
        integers[t] = dot_bytes(integers[t], four, panel[j]);
      }
    }
    const F scale = load(q.scales + at * kTile);
    LOWLAT_UNROLL
    for (int t = 0; t < T; ++t) {
      const F both = mul(scale, set1(block.key_scales[g * kKeyBlock + key + t]));
      sums[t] = fma(integers_to_float(integers[t]), both, sums[t]);
    }
  }
  LOWLAT_UNROLL
  for (int t = 0; t < T; ++t) store(out + t * out_stride, sums[t]);
}

// Scores of a block with all queries, key-major into `out`.
inline void integer_scores(const IntegerQueries& q, const IntegerBlock& block, float* out, Prefetcher& ahead) {
  const std::int64_t width = q.tiles * kTile, step = even_block(block.count);
  for (std::int64_t tile = 0; tile < q.tiles; ++tile) {
    for (std::int64_t key = 0; key < block.count; key += step) {
      with_tokens(least(step, block.count - key), [&]<int T>() {
        score_keys<T>(q, tile, block, key, q.rest_panels * kColumns, out + key * width + tile * kTile, width, ahead);
      });
    }
  }
}

#endif

}  // namespace lowlat::LOWLAT_ISA
