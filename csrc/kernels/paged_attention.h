// Paged attention: query rows over a range of a sequence's KV cache entries, block by block, in bf16 or int8.
#pragma once

#include "../workspace.h"
#include "integer_values.h"

namespace lowlat::LOWLAT_ISA {

// Which channels queries read of an entry: keys are key_dim elements from `key`, values begin at `value`.
struct RowView {
  std::int64_t key, key_dim, value, value_dim;
};

// The entries of a sequence and how they are read.
struct CachedKeys {
  const Cache& cache;
  const std::int32_t* pages;
  std::int64_t entry_dim;
  RowView view;
  float scale;  // of the scores
  const std::int32_t* chosen = nullptr;  // sparse attention: the context is these positions; null: all

  const std::uint8_t* row(std::int64_t place) const {
    return cached_row(cache, pages, chosen == nullptr ? place : chosen[place]);
  }

  // Prefetches the chosen entries that will be gathered from `place`.
  void prefetch_chosen(std::int64_t place, std::int64_t end) const {
    for (std::int64_t i = place; i < least(end, place + kKeyBlock); ++i) {
      const std::uint8_t* at = row(i);
      for (std::int64_t byte = 0; byte < cache.row_bytes; byte += 64) prefetch_far(at + byte);
    }
  }

  // Whether integer products apply: keys and values begin at scale-group boundaries, keys are int8 except for the end
  // of the entry, values are int8.
  bool are_integers() const {
    const std::int64_t quantized = cache.quantized, key_end = view.key + view.key_dim;
    return view.key % 64 == 0 && view.value % 64 == 0 && view.key < quantized &&
           (key_end <= quantized || key_end == entry_dim) && view.value + view.value_dim <= quantized;
  }
};

#if defined(LOWLAT_AVX512)

// Entries [position, position + count): in place if contiguous, else gathered in `scratch`.
inline const std::uint8_t* packed_rows(const CachedKeys& keys, std::int64_t position, std::int64_t count,
                                       std::uint8_t* scratch) {
  const Cache& cache = keys.cache;
  const bool follows = position % cache.page_size + count <= cache.page_size;
  if (keys.chosen == nullptr && follows) return cached_row(cache, keys.pages, position);
  for (std::int64_t i = 0; i < count; ++i) {
    std::memcpy(scratch + i * cache.row_bytes, keys.row(position + i), cache.row_bytes);
  }
  return scratch;
}

// Bytes [first, last) of the entries of a later block, to prefetch.
inline Prefetcher bytes_ahead(const CachedKeys& keys, std::int64_t position, std::int64_t end, std::int64_t first,
                         std::int64_t last) {
  const Cache& cache = keys.cache;
  if (position >= end || keys.chosen != nullptr) return {};
  Matrix rows;
  rows.storage = Storage::int8_rows;
  rows.rows = least(least(kKeyBlock, end - position), cache.page_size - position % cache.page_size);
  rows.columns = least(last - first + 63, cache.row_bytes - first);  // they may begin anywhere in a cache line
  rows.stride = cache.row_bytes;
  rows.data = cached_row(cache, keys.pages, position) + first;
  return Prefetcher(rows);
}

// Query rows quantized for int8 channels, to attend to one range after another.
class IntegerReader {
 public:
  IntegerReader(const CachedKeys& keys, const Queries& q, Scratch& scratch) : keys_(keys), q_(q) {
    const RowView& reads = keys.view;
    const std::int64_t integers = least(reads.key_dim, keys.cache.quantized - reads.key);
    rest_ = reads.key_dim - integers;
    is_one_ = reads.key == reads.value && reads.key_dim >= reads.value_dim;
    const std::int64_t groups = groups_of(integers), tiles = (q.rows + kTile - 1) / kTile;
    const std::int64_t rest_panels = num_panels(rest_);
    auto* scales = scratch.get<float>(12, 2 * tiles * groups * kTile);
    auto* starts = reinterpret_cast<std::int32_t*>(scales + tiles * groups * kTile);
    auto* query_panels = scratch.get<Panel>(11, tiles * (groups + rest_panels));
    rounded_ = {query_panels, scales, starts,             query_panels + tiles * groups,
                tiles,        groups, (integers + 3) / 4, rest_panels};
    round_queries(q.values, q.stride, q.rows, integers, rest_, rounded_);
    const std::int64_t value_groups = groups_of(reads.value_dim);
    const std::int64_t width = tiles * kTile, words = value_groups * kSpan / kQuad * width;
    ByteWeights weights;
    weights.groups = value_groups;
    weights.width = width;
    weights.high = scratch.get<std::uint32_t>(5, 2 * words);
    weights.low = weights.high + words;
    weights.has_peaks = scratch.get<bool>(13, tiles);
    weights.quantum = scratch.get<float>(6, value_groups * (width + kSpan + kTile + 1));
    weights.shares = weights.quantum + value_groups * width;
    weights.inverse_scale = weights.shares + value_groups * kSpan;
    weights.largest = weights.inverse_scale + value_groups * kTile;
    work_ = {scratch.get<float>(10, width * kSpan), weights, scratch.get<P[kQuad]>(2, kSpan / kQuad)};
    scales_ = scratch.get<float>(14, (groups + value_groups) * kSpan);
    rests_ = scratch.get<bf16>(15, kSpan * rest_panels * kColumns);
    rows_ = scratch.get<std::uint8_t>(7, kSpan * keys.cache.row_bytes);
  }

  // Attention over the keys [start, end) into `state`.
  void attend_to(std::int64_t start, std::int64_t end, const SoftmaxState& state) {
    for (std::int64_t at = start; at < end;) {
      const std::int64_t stop = least(end, at - at % kSpan + kSpan);
      IntegerSpan span;
      SpanPrefetcher keys, values;
      std::int64_t first = at;
      for (; at < stop; at += kKeyBlock) {
        if (at + kKeyBlock <= q_.first[0]) {  // outside every query's sliding window
          first = at + kKeyBlock;
          continue;
        }
        if (at < start + kSpan) {
          keys_ahead(at, end).ask_for_all();
          if (!is_one_) {
            values_ahead(at, end).ask_for_all();
            scales_ahead(at, end).ask_for_all();
          }
        }
        keys.add(keys_ahead(at + kSpan, end));
        if (!is_one_) {
          values.add(values_ahead(at + kSpan, end));
          scales_ahead(at + kSpan, end).ask_for_all();
        }
        span.add(block_at(at, least(kKeyBlock, stop - at), end, span.count));
      }
      if (span.count == 0) continue;
      attend_integers(q_, rounded_, span, keys_.view.value_dim, first, keys_.scale, work_, state, keys,
                      is_one_ ? keys : values);
    }
  }

 private:
  static std::int64_t groups_of(std::int64_t channels) { return (channels + kScaled - 1) / kScaled; }

  // With the scales and bf16 channels that follow, if the keys include them.
  Prefetcher keys_ahead(std::int64_t position, std::int64_t end) const {
    const RowView& reads = keys_.view;
    const bool is_last = reads.key + reads.key_dim == keys_.entry_dim;
    const std::int64_t last = is_last ? keys_.cache.row_bytes : reads.key + reads.key_dim;
    return bytes_ahead(keys_, position, end, reads.key, last);
  }
  Prefetcher values_ahead(std::int64_t position, std::int64_t end) const {
    return bytes_ahead(keys_, position, end, keys_.view.value, keys_.view.value + keys_.view.value_dim);
  }
  // Scales of keys and values that are separate.
  Prefetcher scales_ahead(std::int64_t position, std::int64_t end) const {
    const std::int64_t first = padded_to_4(keys_.cache.quantized);
    return bytes_ahead(keys_, position, end, first, first + 4 * groups_of(keys_.cache.quantized));
  }

  // Block `number` of a span.
  IntegerBlock block_at(std::int64_t at, std::int64_t count, std::int64_t end, std::int64_t number) const {
    const RowView& reads = keys_.view;
    const std::int64_t row_bytes = keys_.cache.row_bytes, quantized = keys_.cache.quantized;
    const std::int64_t groups = rounded_.groups, value_groups = work_.weights.groups;
    const std::uint8_t* rows = packed_rows(keys_, at, count, rows_ + number * kKeyBlock * row_bytes);
    const std::uint8_t* scales = rows + padded_to_4(quantized);
    float* key_scales = scales_ + number * (groups + value_groups) * kKeyBlock;
    float* value_scales = is_one_ ? key_scales : key_scales + groups * kKeyBlock;
    bf16* rest = rests_ + number * kKeyBlock * rounded_.rest_panels * kColumns;
    gather_scales(scales + 4 * (reads.key / kScaled), row_bytes, count, groups, key_scales);
    if (!is_one_) {
      gather_scales(scales + 4 * (reads.value / kScaled), row_bytes, count, value_groups, value_scales);
    }
    gather_rest(scales + 4 * groups_of(quantized), row_bytes, count, rest_, rest);
    if (keys_.chosen != nullptr) keys_.prefetch_chosen(at + kSpan, end);
    return {count, row_bytes, rows + reads.key, rows + reads.value, key_scales, value_scales, rest};
  }

  const CachedKeys& keys_;
  const Queries& q_;
  std::int64_t rest_;  // bf16 channels of a key
  bool is_one_;        // the values are the first channels of the keys
  IntegerQueries rounded_;
  IntegerScratch work_;
  float* scales_;
  bf16* rests_;
  std::uint8_t* rows_;
};

#endif

// The same for bf16 entries, or entries dequantized to bf16.
class PlainReader {
 public:
  PlainReader(const CachedKeys& keys, const Queries& q, Scratch& scratch)
      : keys_(keys), q_(q), gathered_stride_(round_up(keys.entry_dim, 32)) {
    const std::int64_t tiles = (q.rows + kTile - 1) / kTile, width = num_panels(keys.view.key_dim);
    scores_ = {scratch.get<float>(5, q.rows * kSpan), scratch.get<bf16>(6, tiles * kTile * kSpan), nullptr, kSpan};
    if (takes_query_panels(q.rows, keys.view.key_dim)) {
      auto* query_panels = scratch.get<Panel>(11, tiles * width);
      const Matrix rows = view(q.values, q.rows, keys.view.key_dim, q.stride);
      for (std::int64_t tile = 0; tile < tiles; ++tile) load_panels(rows, tile, query_panels + tile * width);
      q_.panels = query_panels;
      scores_.transposed = scratch.get<float>(12, tiles * kTile * kSpan);
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
        if (at + kKeyBlock <= q_.first[0]) {  // outside every query's sliding window
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
    const Channels keys{reads.key, reads.key + reads.key_dim};
    const bool are_apart = reads.value < keys.first || reads.value + reads.value_dim > keys.last;
    const Channels values{reads.value, are_apart ? reads.value + reads.value_dim : reads.value};
    const Rows rows =
        keys_.chosen == nullptr
            ? cached_rows(keys_.cache, keys_.pages, at, count, keys_.entry_dim, false, {keys, values}, gathered)
            : gather_rows(keys_.cache, [&](std::int64_t i) { return keys_.row(at + i); }, count, keys_.entry_dim,
                          {keys, values}, gathered);
    if (keys_.chosen != nullptr) keys_.prefetch_chosen(at + kSpan, end);
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

}  // namespace lowlat::LOWLAT_ISA
