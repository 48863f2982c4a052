// Query rows over a range of a sequence's cached rows, block by block.
#pragma once

#include "../workspace.h"
#include "integer_scores.h"

namespace lowlat::LOWLAT_ISA {

// How queries read cached rows: keys key_dim elements from `key` on, values from `value` on.
struct RowView {
  std::int64_t key, key_dim, value, value_dim;
};

// Rows of a sequence and how they are read.
struct CachedKeys {
  const Cache& cache;
  const std::int32_t* pages;
  std::int64_t row_dim;
  RowView view;
  float scale;  // of the scores

  // Whether the rows are int8 latents that are keys and values at once, with integer products to score them by.
  bool are_integers() const {
    return kHasIntegerScores && cache.quantized > 0 && view.key == 0 && view.value == 0 && view.key_dim == row_dim &&
           view.value_dim == cache.quantized;
  }
};

#if defined(LOWLAT_AVX512)

// Rows [position, position + count) of the cache: where they lie if they follow each other, else in `scratch`.
inline const std::uint8_t* packed_rows(const CachedKeys& keys, std::int64_t position, std::int64_t count,
                                       Scratch& scratch) {
  const Cache& cache = keys.cache;
  if (position % cache.page_size + count <= cache.page_size) return cached_row(cache, keys.pages, position);
  auto* rows = scratch.get<std::uint8_t>(7, kKeyBlock * cache.row_bytes);
  for (std::int64_t i = 0; i < count; ++i) {
    std::memcpy(rows + i * cache.row_bytes, cached_row(cache, keys.pages, position + i), cache.row_bytes);
  }
  return rows;
}

// Rows of a block that is read later.
inline Ahead rows_ahead(const CachedKeys& keys, std::int64_t position, std::int64_t end) {
  const Cache& cache = keys.cache;
  if (position >= end) return {};
  Matrix rows;
  rows.storage = Storage::int8_rows;
  rows.rows = least(least(kKeyBlock, end - position), cache.page_size - position % cache.page_size);
  rows.columns = rows.stride = cache.row_bytes;
  rows.data = cached_row(cache, keys.pages, position);
  return Ahead(rows);
}

inline void attend_integer_range(const CachedKeys& keys, const Queries& q, std::int64_t start, std::int64_t end,
                                 Scratch& scratch, const SoftmaxState& state) {
  const std::int64_t latent = keys.view.value_dim, rotary = keys.row_dim - latent;
  const std::int64_t groups = (latent + kScaled - 1) / kScaled, tiles = (q.rows + kTile - 1) / kTile;
  const std::int64_t rotary_panels = num_panels(rotary);
  auto* scales = scratch.get<float>(12, 2 * tiles * groups * kTile);
  auto* starts = reinterpret_cast<std::int32_t*>(scales + tiles * groups * kTile);
  auto* query_panels = scratch.get<Panel>(11, tiles * (groups + rotary_panels));
  const IntegerQueries rounded{query_panels, scales, starts,           query_panels + tiles * groups,
                               tiles,        groups, (latent + 3) / 4, rotary_panels};
  round_queries(q.values, q.stride, q.rows, latent, rotary, rounded);
  const ScoreScratch scores{scratch.get<float>(5, q.rows * kKeyBlock),
                            scratch.get<bf16>(6, groups * q.rows * kKeyBlock),
                            scratch.get<float>(10, tiles * kTile * kKeyBlock)};
  Panel* panels = scratch.get<Panel>(2, attend_panels(keys.view.key_dim));
  IntegerBlock block{nullptr, keys.cache.row_bytes, 0, scratch.get<float>(14, groups * kKeyBlock),
                     scratch.get<bf16>(15, kKeyBlock * rotary_panels * kColumns)};
  for (std::int64_t at = start; at < end; at += kKeyBlock) {
    block.count = least(kKeyBlock, end - at);
    if (at + block.count <= q.first[0]) continue;  // before every query's window
    block.rows = packed_rows(keys, at, block.count, scratch);
    gather_scales(block, latent, rotary);
    Ahead ahead = rows_ahead(keys, at + kKeyBlock, end);
    attend_integers(q, rounded, block, latent, at, keys.scale, panels, scores, state, ahead);
  }
}

#endif

inline void attend_plain_range(const CachedKeys& keys, const Queries& queries, std::int64_t start, std::int64_t end,
                               Scratch& scratch, const SoftmaxState& state) {
  const RowView& reads = keys.view;
  const std::int64_t tiles = (queries.rows + kTile - 1) / kTile, width = num_panels(reads.key_dim);
  ScoreScratch scores{scratch.get<float>(5, queries.rows * kKeyBlock),
                      scratch.get<bf16>(6, queries.rows * kKeyBlock)};
  Queries q = queries;
  if (takes_query_panels(q.rows, reads.key_dim)) {
    auto* query_panels = scratch.get<Panel>(11, tiles * width);
    const Matrix rows = view(q.values, q.rows, reads.key_dim, q.stride);
    for (std::int64_t tile = 0; tile < tiles; ++tile) load_panels(rows, tile, query_panels + tile * width);
    q.panels = query_panels;
    scores.turned = scratch.get<float>(12, tiles * kTile * kKeyBlock);
  }
  Panel* panels = scratch.get<Panel>(2, attend_panels(reads.key_dim));
  auto* gathered = scratch.get<bf16>(7, kKeyBlock * round_up(keys.row_dim, 32));
  for (std::int64_t at = start; at < end; at += kKeyBlock) {
    const std::int64_t count = least(kKeyBlock, end - at);
    if (at + count <= q.first[0]) continue;  // before every query's window
    const Rows rows = cached_rows(keys.cache, keys.pages, at, count, keys.row_dim, false, gathered);
    KeyBlock block{view(rows.data + reads.key, count, reads.key_dim, rows.stride),
                   view(rows.data + reads.value, count, reads.value_dim, rows.stride), {}, {}};
    if (at + kKeyBlock < end && rows.data != gathered) {
      const auto* next = reinterpret_cast<const bf16*>(cached_row(keys.cache, keys.pages, at + kKeyBlock));
      const std::int64_t size = least(kKeyBlock, end - at - kKeyBlock);
      block.next_keys = view(next + reads.key, size, reads.key_dim, rows.stride);
      const bool is_apart = reads.value >= reads.key + reads.key_dim || reads.key > reads.value;
      if (is_apart) block.next_values = view(next + reads.value, size, reads.value_dim, rows.stride);
    }
    attend(q, block, at, keys.scale, panels, scores, state);
  }
}

// Attention over the keys [start, end) into `state`. Takes slots 2, 5 to 7, 10 to 12, 14 and 15
// of `scratch`.
inline void attend_range(const CachedKeys& keys, const Queries& q, std::int64_t start, std::int64_t end,
                         Scratch& scratch, const SoftmaxState& state) {
  state.clear(q.rows);
#if defined(LOWLAT_AVX512)
  if (keys.are_integers()) return attend_integer_range(keys, q, start, end, scratch, state);
#endif
  attend_plain_range(keys, q, start, end, scratch, state);
}

}  // namespace lowlat::LOWLAT_ISA
