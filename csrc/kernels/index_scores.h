// Index scores of sparse attention (DSA): I(t, s) = sum over heads h of w(t, h) relu(q(t, h) . k(s)), fp32.
//
// Query rows times tiles of 16 keys, as in a GEMM: all tokens of a group share a pass over the keys. Queries are rounded
// to int8 with a scale per head, and products are exact integers. The score of a token and a key is one chain of
// operations, whatever else the group computes: bits depend on the two alone.
#pragma once

#include <utility>

#include "../workspace.h"
#include "index_keys.h"

namespace lowlat::LOWLAT_ISA {

constexpr std::int64_t kIndexRows = 32;  // rows, heads of tokens, whose products with a block of keys are computed at once

// The index queries of consecutive tokens of a sequence.
struct IndexQueries {
  const bf16* q;         // [tokens, heads, dim]
  const float* weights;  // [tokens, heads], with the factor dim^-0.5
  std::int64_t tokens, heads, dim;

  std::int64_t tokens_at_once() const { return most(1, kIndexRows / heads); }
};

using IndexProduct = std::int32_t;

// Query rows in int8.
class IndexRows {
 public:
  IndexRows(const IndexQueries& queries, Scratch& scratch)
      : quads_(index_quads(queries.dim)), is_whole_(queries.dim % kTileBytes == 0) {
    const std::int64_t rows = queries.tokens * queries.heads;
    words_ = scratch.get<std::uint32_t>(11, (rows + kTile - 1) * quads_);
    weights_ = scratch.get<float>(12, rows);
    starts_ = scratch.get<std::int32_t>(13, rows);
    for (std::int64_t r = 0; r < rows; ++r) {
      auto* values = reinterpret_cast<std::int8_t*>(words_ + r * quads_);
      words_[(r + 1) * quads_ - 1] = 0;
      weights_[r] = queries.weights[r] * round_to_int8(queries.q + r * queries.dim, queries.dim, values);
      std::int32_t sum = 0;
      for (std::int64_t i = 0; i < 4 * quads_; ++i) sum += values[i];
      starts_[r] = -kDotExcess * sum;
    }
  }

  // The head weight of a row, with the row's scale.
  float weight(std::int64_t row) const { return weights_[row]; }

  // Products of 16 keys with a row, which lack their correction.
  F product(const IndexProduct* products, std::int64_t row) const {
    return integers_to_float(add_integers(pairs(products), set1_pair(static_cast<std::uint32_t>(starts_[row]))));
  }

  // The keys of the next products: up to 4 adjacent tiles.
  void set_keys(const std::uint8_t* tiles, std::int64_t tile_bytes, std::int64_t count) {
    tiles_ = tiles;
    tile_bytes_ = tile_bytes;
    count_ = count;
  }

  // Products of rows with the keys: out [rows rounded up to a tile, kKeyBlock].
  void multiply(std::int64_t first, std::int64_t rows, Prefetcher& ahead, IndexProduct* out) const {
#if defined(LOWLAT_AMX)
    if (is_whole_) return multiply_by_tiles(first, rows, ahead, out);
#endif
    const std::int64_t step = even_block(rows);
    for (std::int64_t i = 0; i < count_; ++i) {
      ahead.ask(static_cast<int>(tile_bytes_ / 64));
      for (std::int64_t row = 0; row < rows; row += step) {
        with_tokens(least(step, rows - row), [&]<int T>() {
          multiply_tile<T>(first + row, tiles_ + i * tile_bytes_, out + row * kKeyBlock + i * kTile);
        });
      }
    }
  }

 private:
  static constexpr std::int64_t kTileBytes = 64;  // channels of a tile register

  template <int T>
  void multiply_tile(std::int64_t row, const std::uint8_t* tile, IndexProduct* out) const {
    const std::uint32_t* words = words_ + row * quads_;
    P sums[T];
    LOWLAT_UNROLL
    for (int t = 0; t < T; ++t) sums[t] = zero_pairs();
    for (std::int64_t j = 0; j < quads_; ++j) {
      const P keys = pairs(tile + 64 * j);
      LOWLAT_UNROLL
      for (int t = 0; t < T; ++t) sums[t] = dot_offset_bytes(sums[t], keys, set1_pair(words[t * quads_ + j]));
    }
    LOWLAT_UNROLL
    for (int t = 0; t < T; ++t) store_pairs(out + t * kKeyBlock, sums[t]);
  }

#if defined(LOWLAT_AMX)
  // A tile of keys is, byte for byte, a tile register for every 64 channels.
  void multiply_by_tiles(std::int64_t first, std::int64_t rows, Prefetcher& ahead, IndexProduct* out) const {
    const long pitch = static_cast<long>(4 * quads_), out_pitch = kKeyBlock * sizeof(IndexProduct);
    configure_tiles(kTileRows, kTileRows);
    for (std::int64_t row = 0; row < rows; row += 2 * kTile) {
      const bool has_more = row + kTile < rows;
      const std::uint32_t* top = words_ + (first + row) * quads_;
      const std::uint32_t* bottom = top + kTile * quads_;
      for (std::int64_t i = 0; i < count_; i += 2) {
        const bool has_two = i + 1 < count_;
        const std::uint8_t* left = tiles_ + i * tile_bytes_;
        const std::uint8_t* right = left + tile_bytes_;
        IndexProduct* to = out + row * kKeyBlock + i * kTile;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (std::int64_t j = 0; j < quads_; j += kTile) {
          ahead.ask(kLinesOfTiles);
          _tile_loadd(4, top + j, pitch);
          _tile_loadd(6, left + 64 * j, 64);
          _tile_dpbsud(0, 4, 6);
          if (has_two) {
            _tile_loadd(7, right + 64 * j, 64);
            _tile_dpbsud(1, 4, 7);
          }
          if (has_more) {
            _tile_loadd(5, bottom + j, pitch);
            _tile_dpbsud(2, 5, 6);
            if (has_two) _tile_dpbsud(3, 5, 7);
          }
        }
        _tile_stored(0, to, out_pitch);
        if (has_two) _tile_stored(1, to + kTile, out_pitch);
        if (!has_more) continue;
        _tile_stored(2, to + kTile * kKeyBlock, out_pitch);
        if (has_two) _tile_stored(3, to + kTile * kKeyBlock + kTile, out_pitch);
      }
    }
  }
#endif

  std::int64_t quads_;
  bool is_whole_;         // rows fill tile registers
  std::uint32_t* words_;  // [rows, quads]
  float* weights_;        // [rows]
  std::int32_t* starts_;  // [rows]: corrections of products
  const std::uint8_t* tiles_ = nullptr;
  std::int64_t tile_bytes_ = 0, count_ = 0;
};

// Scores of a token, whose rows begin at `row`, with T tiles of keys: sums over the heads in order, a tile per vector.
// Scores are finite or infinity, which a NaN becomes: it is chosen, and reaches the output.
template <int T>
inline void sum_index_heads(const IndexRows& rows, std::int64_t row, std::int64_t heads, const IndexProduct* products,
                            const IndexCache& cache, const std::uint8_t* tiles, float* scores) {
  constexpr float kMost = 3.40282347e38f;
  F totals[T];
  LOWLAT_UNROLL
  for (int t = 0; t < T; ++t) totals[t] = zero();
  for (std::int64_t h = 0; h < heads; ++h) {
    const F weight = set1(rows.weight(row + h));
    LOWLAT_UNROLL
    for (int t = 0; t < T; ++t) {
      const F positive = max(zero(), rows.product(products + h * kKeyBlock + t * kTile, row + h));
      totals[t] = fma(weight, positive, totals[t]);
    }
  }
  LOWLAT_UNROLL
  for (int t = 0; t < T; ++t) {
    const F total = mul(totals[t], load(index_scales(cache, tiles + t * cache.tile_bytes)));
    store(scores + t * kTile, max(set1(-kMost), min(total, set1(-kNone))));
  }
}

// Scores of all tokens with the keys [first, last), whole tiles: token t's at scores + t * stride + key. `first` is a
// multiple of kKeyBlock. Uses slots 5 and 11 to 13 of `scratch`.
inline void score_index_keys(const IndexQueries& queries, const IndexCache& cache, const std::int32_t* pages,
                             std::int64_t first, std::int64_t last, Scratch& scratch, float* scores,
                             std::int64_t stride) {
  const std::int64_t at_once = queries.tokens_at_once(), heads = queries.heads;
  const std::int64_t products = round_up(at_once * heads, kTile) * kKeyBlock;
  auto* out = scratch.get<IndexProduct>(5, 2 * products);
  IndexRows rows(queries, scratch);
  std::int64_t count = 0;
  for (std::int64_t key = first; key < last; key += count) {
    count = least(kKeyBlock, least(cache.page_size - key % cache.page_size, round_up(last - key, kTile)));
    const std::int64_t next = key + count, tiles = count / kTile;
    const std::uint8_t* at = index_tile(cache, pages, key);
    Prefetcher ahead;
    if (next < last) ahead = Prefetcher(index_tile(cache, pages, next), tiles * cache.tile_bytes);
    rows.set_keys(at, cache.tile_bytes, tiles);
    const auto sum = [&](std::int64_t t, const IndexProduct* from) {
      for (std::int64_t stop = least(t + at_once, queries.tokens); t < stop; ++t, from += heads * kKeyBlock) {
        float* to = scores + t * stride + key;
        if (tiles == 4) {
          sum_index_heads<4>(rows, t * heads, heads, from, cache, at, to);
          continue;
        }
        for (std::int64_t tile = 0; tile < tiles; ++tile) {
          const std::uint8_t* keys = at + tile * cache.tile_bytes;
          sum_index_heads<1>(rows, t * heads, heads, from + tile * kTile, cache, keys, to + tile * kTile);
        }
      }
    };
    // Sums come after the next products, so that vector units and tile registers work at the same time.
    IndexProduct *own = out, *before = out + products;
    for (std::int64_t t = 0; t < queries.tokens; t += at_once, std::swap(own, before)) {
      rows.multiply(t * heads, least(at_once, queries.tokens - t) * heads, ahead, own);
      if (t > 0) sum(t - at_once, before);
    }
    sum((queries.tokens - 1) / at_once * at_once, before);
    ahead.ask_for_all();
  }
}

}  // namespace lowlat::LOWLAT_ISA
