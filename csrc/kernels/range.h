// Query rows over a range of a sequence's cached rows, block by block.
#pragma once

#include "../workspace.h"
#include "integer_values.h"

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

  // Whether whole rows are keys, and values are the first of their int8 channels.
  bool are_integers() const {
    return cache.quantized > 0 && view.key == 0 && view.value == 0 && view.key_dim == row_dim &&
           view.value_dim <= cache.quantized;
  }
};

#if defined(LOWLAT_AVX512)

// Rows [position, position + count) of the cache: where they lie if they follow each other, else in `scratch`.
inline const std::uint8_t* packed_rows(const CachedKeys& keys, std::int64_t position, std::int64_t count,
                                       std::uint8_t* scratch) {
  const Cache& cache = keys.cache;
  if (position % cache.page_size + count <= cache.page_size) return cached_row(cache, keys.pages, position);
  for (std::int64_t i = 0; i < count; ++i) {
    std::memcpy(scratch + i * cache.row_bytes, cached_row(cache, keys.pages, position + i), cache.row_bytes);
  }
  return scratch;
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

// Query rows made ready for int8 latents, to attend to one range after the other.
class IntegerReader {
 public:
  IntegerReader(const CachedKeys& keys, const Queries& q, Scratch& scratch)
      : keys_(keys), q_(q), scratch_(scratch), integers_(keys.cache.quantized), rest_(keys.row_dim - integers_) {
    const std::int64_t groups = (integers_ + kScaled - 1) / kScaled, tiles = (q.rows + kTile - 1) / kTile;
    const std::int64_t rest_panels = num_panels(rest_);
    auto* scales = scratch.get<float>(12, 2 * tiles * groups * kTile);
    auto* starts = reinterpret_cast<std::int32_t*>(scales + tiles * groups * kTile);
    auto* query_panels = scratch.get<Panel>(11, tiles * (groups + rest_panels));
    rounded_ = {query_panels, scales, starts,              query_panels + tiles * groups,
                tiles,        groups, (integers_ + 3) / 4, rest_panels};
    round_queries(q.values, q.stride, q.rows, integers_, rest_, rounded_);
    const std::int64_t value_groups = (keys.view.value_dim + kScaled - 1) / kScaled;
    const std::int64_t width = tiles * kTile, words = value_groups * kSpan / kQuad * width;
    ByteWeights weights;
    weights.groups = value_groups;
    weights.width = width;
    weights.high = scratch.get<std::uint32_t>(5, 2 * words);
    weights.low = weights.high + words;
    weights.has_peaks = scratch.get<bool>(13, tiles);
    weights.worth = scratch.get<float>(6, value_groups * (width + kSpan + kTile + 1));
    weights.shares = weights.worth + value_groups * width;
    weights.of_one = weights.shares + value_groups * kSpan;
    weights.largest = weights.of_one + value_groups * kTile;
    work_ = {scratch.get<float>(10, width * kSpan), weights, scratch.get<P[kQuad]>(2, kSpan / kQuad)};
    scales_ = scratch.get<float>(14, kSpanBlocks * groups * kKeyBlock);
    rests_ = scratch.get<bf16>(15, kSpan * rest_panels * kColumns);
    rows_ = scratch.get<std::uint8_t>(7, kSpan * keys.cache.row_bytes);
  }

  // Attention over the keys [start, end) into `state`.
  void attend_to(std::int64_t start, std::int64_t end, const SoftmaxState& state) {
    for (std::int64_t at = start; at < end;) {
      const std::int64_t stop = least(end, at - at % kSpan + kSpan);
      IntegerSpan span;
      SpanAhead ahead;
      std::int64_t first = at;
      for (; at < stop; at += kKeyBlock) {
        if (at + kKeyBlock <= q_.first[0]) {  // before every query's window
          first = at + kKeyBlock;
          continue;
        }
        if (at < start + kSpan) rows_ahead(keys_, at, end).ask_for_all();
        ahead.add(rows_ahead(keys_, at + kSpan, end));
        span.add(block_at(at, least(kKeyBlock, stop - at), span.count));
      }
      if (span.count > 0) {
        attend_integers(q_, rounded_, span, keys_.view.value_dim, first, keys_.scale, work_, state, ahead);
      }
    }
  }

 private:
  const CachedKeys& keys_;
  const Queries& q_;
  Scratch& scratch_;
  // Block `number` of a span.
  IntegerBlock block_at(std::int64_t at, std::int64_t count, std::int64_t number) const {
    const std::int64_t row_bytes = keys_.cache.row_bytes;
    const std::uint8_t* rows = packed_rows(keys_, at, count, rows_ + number * kKeyBlock * row_bytes);
    const IntegerBlock block{rows, row_bytes, count, scales_ + number * rounded_.groups * kKeyBlock,
                             rests_ + number * kKeyBlock * rounded_.rest_panels * kColumns};
    gather_scales(block, integers_, rest_);
    return block;
  }

  std::int64_t integers_, rest_;  // channels of a row
  IntegerQueries rounded_;
  IntegerScratch work_;
  float* scales_;
  bf16* rests_;
  std::uint8_t* rows_;
};

#endif

// The same for rows that are bf16, or go into it.
class PlainReader {
 public:
  PlainReader(const CachedKeys& keys, const Queries& q, Scratch& scratch)
      : keys_(keys), q_(q), gathered_stride_(round_up(keys.row_dim, 32)) {
    const std::int64_t tiles = (q.rows + kTile - 1) / kTile, width = num_panels(keys.view.key_dim);
    scores_ = {scratch.get<float>(5, q.rows * kSpan), scratch.get<bf16>(6, tiles * kTile * kSpan), nullptr, kSpan};
    if (takes_query_panels(q.rows, keys.view.key_dim)) {
      auto* query_panels = scratch.get<Panel>(11, tiles * width);
      const Matrix rows = view(q.values, q.rows, keys.view.key_dim, q.stride);
      for (std::int64_t tile = 0; tile < tiles; ++tile) load_panels(rows, tile, query_panels + tile * width);
      q_.panels = query_panels;
      scores_.turned = scratch.get<float>(12, tiles * kTile * kSpan);
    }
    panels_ = scratch.get<Panel>(2, attend_panels(keys.view.key_dim));
    gathered_ = scratch.get<bf16>(7, kSpan * gathered_stride_);
  }

  void attend_to(std::int64_t start, std::int64_t end, const SoftmaxState& state) {
    for (std::int64_t at = start; at < end;) {
      const std::int64_t stop = least(end, at - at % kSpan + kSpan);
      KeyBlock blocks[kSpanBlocks];
      std::int64_t count = 0, first = at;
      for (; at < stop; at += kKeyBlock) {
        if (at + kKeyBlock <= q_.first[0]) {  // before every query's window
          first = at + kKeyBlock;
          continue;
        }
        blocks[count] = block_at(at, least(kKeyBlock, stop - at), end, gathered_ + count * kKeyBlock * gathered_stride_);
        ++count;
      }
      if (count > 0) attend(q_, blocks, count, first, keys_.scale, panels_, scores_, state);
    }
  }

 private:
  KeyBlock block_at(std::int64_t at, std::int64_t count, std::int64_t end, bf16* gathered) const {
    const RowView& reads = keys_.view;
    const Rows rows = cached_rows(keys_.cache, keys_.pages, at, count, keys_.row_dim, false, gathered);
    KeyBlock block{view(rows.data + reads.key, count, reads.key_dim, rows.stride),
                   view(rows.data + reads.value, count, reads.value_dim, rows.stride), {}, {}};
    const std::int64_t later = at + kSpan;
    if (later < end && rows.data != gathered) {
      const auto* next = reinterpret_cast<const bf16*>(cached_row(keys_.cache, keys_.pages, later));
      const std::int64_t size = least(kKeyBlock, end - later);
      block.next_keys = view(next + reads.key, size, reads.key_dim, rows.stride);
      const bool is_apart = reads.value >= reads.key + reads.key_dim || reads.key > reads.value;
      if (is_apart) block.next_values = view(next + reads.value, size, reads.value_dim, rows.stride);
    }
    return block;
  }

  const CachedKeys& keys_;
  Queries q_;
  std::int64_t gathered_stride_;
  ScoreScratch scores_;
  Panel* panels_;
  bf16* gathered_;
};

// Attention over the splits [first, last) of a context that ends at `end`, added up in `state`; `part` holds one split.
template <class Reader>
inline void attend_splits(Reader reader, const Queries& q, std::int64_t first, std::int64_t last, std::int64_t end,
                          const SoftmaxState& state, const SoftmaxState& part) {
  state.clear(q.rows);
  bool is_empty = true;
  for (std::int64_t split = first; split < last; ++split) {
    if (split_start(split + 1) <= q.first[0]) continue;  // before every query's window
    if (!is_empty) part.clear(q.rows);
    reader.attend_to(split_start(split), least(end, split_start(split + 1)), is_empty ? state : part);
    if (!is_empty) fold(part, state, q.rows);
    is_empty = false;
  }
}

// The same with the reader that suits the rows. Takes slots 2, 5 to 7 and 10 to 15 of `scratch`.
inline void attend_splits(const CachedKeys& keys, const Queries& q, std::int64_t first, std::int64_t last,
                          std::int64_t end, Scratch& scratch, const SoftmaxState& state, const SoftmaxState& part) {
#if defined(LOWLAT_AVX512)
  if (keys.are_integers()) return attend_splits(IntegerReader(keys, q, scratch), q, first, last, end, state, part);
#endif
  attend_splits(PlainReader(keys, q, scratch), q, first, last, end, state, part);
}

}  // namespace lowlat::LOWLAT_ISA
