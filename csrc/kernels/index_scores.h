// Index scores of sparse attention (DSA): I(t, s) = sum over heads h of w(t, h) relu(q(t, h) . k(s)), fp32.
//
// Query rows times tiles of 16 keys, as in a GEMM: all tokens of a group share a pass over the keys. The score of a
// token and a key is one chain of operations, whatever else the group computes: bits depend on the two alone.
#pragma once

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

#if defined(LOWLAT_AVX512)

// Query rows in int8: [rows, 4 * quads] with a scale and the correction for the 128 in every key byte per 64 channels.
struct IntegerIndexRows {
  const std::uint32_t* words;
  const float* scales;
  const std::int32_t* starts;
  std::int64_t quads, groups;
};

inline IntegerIndexRows round_index_rows(const bf16* q, std::int64_t rows, std::int64_t dim, Scratch& scratch) {
  const std::int64_t quads = index_quads(dim), groups = index_scales(dim);
  auto* words = scratch.get<std::uint32_t>(11, rows * quads);
  auto* scales = scratch.get<float>(12, rows * groups);
  auto* starts = scratch.get<std::int32_t>(13, rows * groups);
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::int64_t count = least(kIndexScaled, dim - g * kIndexScaled);
      alignas(64) std::int8_t values[kIndexScaled] = {};
      scales[r * groups + g] = round_to_int8(q + r * dim + g * kIndexScaled, count, values);
      std::int32_t sum = 0;
      for (std::int64_t i = 0; i < count; ++i) sum += values[i];
      starts[r * groups + g] = -128 * sum;
      std::memcpy(words + r * quads + g * kIndexScaled / 4, values, (count + 3) / 4 * 4);
    }
  }
  return {words, scales, starts, quads, groups};
}

// Products of T rows from `row` with a tile of int8 keys.
template <int T>
inline void multiply_index_tile(const IntegerIndexRows& x, std::int64_t row, const std::uint8_t* tile, float* out,
                                std::int64_t out_stride) {
  const auto* key_scales = reinterpret_cast<const float*>(tile + 64 * x.quads);
  F sums[T];
  LOWLAT_UNROLL
  for (int t = 0; t < T; ++t) sums[t] = zero();
  for (std::int64_t g = 0; g < x.groups; ++g) {
    P integers[T];
    LOWLAT_UNROLL
    for (int t = 0; t < T; ++t) {
      integers[t] = set1_pair(static_cast<std::uint32_t>(x.starts[(row + t) * x.groups + g]));
    }
    const std::int64_t first = g * (kIndexScaled / 4), last = least(first + kIndexScaled / 4, x.quads);
    for (std::int64_t j = first; j < last; ++j) {
      const P keys = pairs(tile + 64 * j);
      LOWLAT_UNROLL
      for (int t = 0; t < T; ++t) integers[t] = dot_bytes(integers[t], keys, set1_pair(x.words[(row + t) * x.quads + j]));
    }
    const F scale = load(key_scales + g * kTile);
    LOWLAT_UNROLL
    for (int t = 0; t < T; ++t) {
      const F both = mul(scale, set1(x.scales[(row + t) * x.groups + g]));
      sums[t] = fma(integers_to_float(integers[t]), both, sums[t]);
    }
  }
  LOWLAT_UNROLL
  for (int t = 0; t < T; ++t) store(out + t * out_stride, sums[t]);
}

#endif

// Products of query rows with up to 4 adjacent tiles of keys.
class IndexProducts {
 public:
  IndexProducts(const IndexCache& cache, const IndexQueries& queries, Scratch& scratch)
      : cache_(cache), dim_(queries.dim), width_(num_panels(queries.dim)) {
    const std::int64_t rows = queries.tokens * queries.heads;
#if defined(LOWLAT_AVX512)
    if (cache.is_int8) {
      integers_ = round_index_rows(queries.q, rows, dim_, scratch);
      return;
    }
#endif
    q_ = queries.q;
    stride_ = width_ * kColumns;
    if (stride_ != dim_) {
      auto* padded = scratch.get<bf16>(11, rows * stride_);
      copy_rows(q_, dim_, rows, dim_, padded);
      q_ = padded;
    }
    if (cache.is_int8 || stride_ != dim_) panels_ = scratch.get<Panel>(2, 4 * width_);
  }

  // The tiles that multiply_rows() takes next; those at `later`, if any, are prefetched meanwhile.
  void set_tiles(const std::uint8_t* tiles, std::int64_t count, const std::uint8_t* later) {
    tiles_ = tiles;
    count_ = count;
    ahead_ = {};
    if (later != nullptr) {
      Matrix bytes;
      bytes.storage = Storage::int8_rows;
      bytes.rows = 1;
      bytes.columns = bytes.stride = count * cache_.tile_bytes;
      bytes.data = later;
      ahead_ = Prefetcher(bytes);
    }
    if (panels_ == nullptr) return;
    for (std::int64_t i = 0; i < count; ++i) copy_index_tile(cache_, tiles + i * cache_.tile_bytes, dim_, panels_ + i * width_);
  }

  // out [rows, kKeyBlock]: of the rows from `first`.
  void multiply_rows(std::int64_t first, std::int64_t rows, float* out) {
#if defined(LOWLAT_AVX512)
    if (cache_.is_int8) {
      for (std::int64_t i = 0; i < count_; ++i) {
        const std::uint8_t* tile = tiles_ + i * cache_.tile_bytes;
        ahead_.ask(static_cast<int>(cache_.tile_bytes / 64));
        const std::int64_t step = even_block(rows);
        for (std::int64_t row = 0; row < rows; row += step) {
          with_tokens(least(step, rows - row), [&]<int T>() {
            multiply_index_tile<T>(integers_, first + row, tile, out + row * kKeyBlock + i * kTile, kKeyBlock);
          });
        }
      }
      return;
    }
#endif
    const Panel* panels = panels_ != nullptr ? panels_ : reinterpret_cast<const Panel*>(tiles_);
    multiply(panels, count_, width_, width_, q_ + first * stride_, stride_, rows, out, kKeyBlock, false, &ahead_);
    ahead_.ask_for_all();
  }

 private:
  const IndexCache& cache_;
  std::int64_t dim_, width_, stride_ = 0, count_ = 0;
  const bf16* q_ = nullptr;
  Panel* panels_ = nullptr;  // copies, for tiles that are no panels
  const std::uint8_t* tiles_ = nullptr;
  Prefetcher ahead_;
#if defined(LOWLAT_AVX512)
  IntegerIndexRows integers_{};
#endif
};

// Sums over the heads in order, a tile of keys per vector: products [heads, kKeyBlock] of one token. Scores are finite
// or infinity, which a NaN becomes: it is chosen, and reaches the output.
inline void sum_index_heads(const float* products, const float* weights, std::int64_t heads, std::int64_t tiles,
                            float* scores) {
  constexpr float kMost = 3.40282347e38f;
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    F total = zero();
    for (std::int64_t h = 0; h < heads; ++h) {
      const F positive = max(zero(), load(products + h * kKeyBlock + tile * kTile));
      total = fma(set1(weights[h]), positive, total);
    }
    store(scores + tile * kTile, max(set1(-kMost), min(total, set1(-kNone))));
  }
}

// Scores of all tokens with the keys [first, last), whole tiles: token t's at scores + t * stride + key. `first` is a
// multiple of kKeyBlock. Uses slots 2, 5 and 11 to 13 of `scratch`.
inline void score_index_keys(const IndexQueries& queries, const IndexCache& cache, const std::int32_t* pages,
                             std::int64_t first, std::int64_t last, Scratch& scratch, float* scores,
                             std::int64_t stride) {
  const std::int64_t at_once = queries.tokens_at_once();
  auto* out = scratch.get<float>(5, at_once * queries.heads * kKeyBlock);
  IndexProducts products(cache, queries, scratch);
  std::int64_t count = 0;
  for (std::int64_t key = first; key < last; key += count) {
    count = least(kKeyBlock, least(cache.page_size - key % cache.page_size, round_up(last - key, kTile)));
    const std::int64_t next = key + count;
    products.set_tiles(index_tile(cache, pages, key), count / kTile,
                       next < last ? index_tile(cache, pages, next) : nullptr);
    for (std::int64_t t = 0; t < queries.tokens; t += at_once) {
      const std::int64_t tokens = least(at_once, queries.tokens - t);
      products.multiply_rows(t * queries.heads, tokens * queries.heads, out);
      for (std::int64_t i = 0; i < tokens; ++i) {
        sum_index_heads(out + i * queries.heads * kKeyBlock, queries.weights + (t + i) * queries.heads, queries.heads,
                        count / kTile, scores + (t + i) * stride + key);
      }
    }
  }
}

}  // namespace lowlat::LOWLAT_ISA
