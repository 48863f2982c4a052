// Flash attention over KV cache entries: blocks of 64 keys, online softmax.
//
// Blocks start at multiples of 64 in the context and are processed two at a time, within the splits of workspace.h.
// So a query's result is one chain of operations fixed by its own position, whatever else is in the batch.
#pragma once

#include <cmath>

#include "transposed.h"

namespace lowlat::LOWLAT_ISA {

constexpr std::int64_t kKeyBlock = 64;
// Blocks that share one softmax step: their weighted values are summed in registers.
constexpr int kSpanBlocks = TransposedRows::kMost;
constexpr std::int64_t kSpan = kSpanBlocks * kKeyBlock;
constexpr float kNone = -__builtin_inff();

// Up to 64 cached entries: keys [keys, key_dim] and values [keys, value_dim], views of the cache or of scratch.
struct KeyBlock {
  Matrix keys;
  Matrix values;
  Matrix next_keys;    // of a later block, to prefetch; empty if unknown
  Matrix next_values;  // empty if the keys contain the values
};

// Online softmax state of query rows: maximum score, sum of exponentials, weighted values [rows, stride].
struct SoftmaxState {
  float* top;
  float* total;
  float* values;
  std::int64_t stride;  // value_dim rounded up to 32

  void clear(std::int64_t rows) const {
    for (std::int64_t r = 0; r < rows; ++r) top[r] = kNone;
    std::memset(total, 0, rows * sizeof(float));
    std::memset(values, 0, rows * stride * sizeof(float));
  }
  // Rescales for more keys, whose maximum score is at most `top` and whose weights sum to `sum`.
  void update(std::int64_t row, float new_top, float sum) const {
    const float before = top[row];
    if (new_top == before) {
      total[row] += sum;
      return;
    }
    const float keep = before == kNone ? 0.0f : scalar_exp(before - new_top);
    top[row] = new_top;
    total[row] = total[row] * keep + sum;
    float* of_row = values + row * stride;
    for (std::int64_t c = 0; c < stride; c += 16) store(of_row + c, mul(load(of_row + c), set1(keep)));
  }
  SoftmaxState from(std::int64_t row) const { return {top + row, total + row, values + row * stride, stride}; }
};

// Query rows [rows, stride], zero beyond the key channels, and the keys each may attend to: [first, last) in the
// context.
struct Queries {
  const bf16* values;
  std::int64_t stride;
  std::int64_t rows;
  const std::int64_t* first;
  const std::int64_t* last;
  const Panel* panels = nullptr;  // the rows packed as panels, if they take the weights' side of the GEMM
};

// Score buffers: `stride` fp32 and bf16 values per query row.
struct ScoreScratch {
  float* scores;
  bf16* weights;
  float* transposed = nullptr;  // if q.panels are used: all scores, key-major, in whole tiles of queries
  std::int64_t stride = kKeyBlock;

  // The buffers of a later block of a span.
  ScoreScratch block(std::int64_t number) const {
    return {scores + number * kKeyBlock, weights + number * kKeyBlock, transposed, stride};
  }
};

// Rows of one head, `step` elements apart, padded for the GEMM: a multiple of 32 wide, zeros beyond `width`.
inline void copy_rows(const bf16* from, std::int64_t step, std::int64_t rows, std::int64_t width, bf16* to) {
  const std::int64_t stride = round_up(width, kColumns);
  for (std::int64_t r = 0; r < rows; ++r) {
    std::memcpy(to + r * stride, from + r * step, width * sizeof(bf16));
    std::memset(to + r * stride + width, 0, (stride - width) * sizeof(bf16));
  }
}

// Whether scores put the queries on the weights' side of the GEMM: cached entries are then read row-major instead of
// being transposed. Same bits. Pays off for whole tiles of queries; key rows must be readable in whole steps of 32.
inline bool takes_query_panels(std::int64_t rows, std::int64_t key_dim) {
  return key_dim % kColumns == 0 && (rows % kTile == 0 || rows > 2 * kTile);
}

// The scaled scores of one row with a block, -inf for masked keys.
inline void visible_scores(const Queries& q, std::int64_t r, std::int64_t start, float scale, const float* scores,
                           F* row) {
  for (int i = 0; i < 4; ++i) row[i] = mul(load(scores + 16 * i), set1(scale));
  if (q.first[r] <= start && q.last[r] >= start + kKeyBlock) return;
  const F first = set1(static_cast<float>(most(-1, least(q.first[r] - start, kKeyBlock))));
  const F last = set1(static_cast<float>(most(-1, least(q.last[r] - start, kKeyBlock))));
  for (int i = 0; i < 4; ++i) {
    const F key = add(lane_numbers(), set1(16.0f * static_cast<float>(i)));
    row[i] = within(row[i], key, first, last, set1(kNone));
  }
}

// Online softmax: turns the scores of `blocks` <= kMost blocks, the first of which starts at `start`, into bf16
// weights in scratch.weights [rows, scratch.stride], zero for masked keys, and updates the state.
template <int kMost>
inline void softmax_step(const Queries& q, std::int64_t start, std::int64_t blocks, float scale,
                         const ScoreScratch& scratch, const SoftmaxState& state) {
  for (std::int64_t r = 0; r < q.rows; ++r) {
    F row[4 * kMost], highest = set1(kNone), sums = zero();
    for (std::int64_t b = 0; b < blocks; ++b) {
      F* part = row + 4 * b;
      visible_scores(q, r, start + b * kKeyBlock, scale, scratch.scores + r * scratch.stride + b * kKeyBlock, part);
      highest = max(highest, max(max(part[0], part[1]), max(part[2], part[3])));
    }
    const float before = state.top[r], top = std::fmax(before, largest(highest));
    const F base = set1(top == kNone ? 0.0f : top);
    for (std::int64_t b = 0; b < blocks; ++b) {
      F* part = row + 4 * b;
      for (int i = 0; i < 4; ++i) part[i] = exp_of_negative(sub(part[i], base));
      bf16* weights = scratch.weights + r * scratch.stride + b * kKeyBlock;
      store_pairs(weights, pairs_in_order(part[0], part[1]));
      store_pairs(weights + 32, pairs_in_order(part[2], part[3]));
      sums = add(sums, add(add(part[0], part[1]), add(part[2], part[3])));
    }
    state.update(r, top, sum(sums));
  }
}

// Panels that attend() may need: two tiles of keys, or two blocks of 16 channels of a span's values.
inline std::int64_t attend_panels(std::int64_t key_dim) { return most(2 * num_panels(key_dim), 2 * num_panels(kSpan)); }

// Transposes key-major scores of whole query tiles into query rows, 16 x 16 at a time.
inline void transpose_scores(std::int64_t rows, const ScoreScratch& scratch) {
  const std::int64_t tiles = (rows + kTile - 1) / kTile;
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    for (std::int64_t key = 0; key < kKeyBlock; key += kTile) {
      Panel square;
      for (int i = 0; i < kTile; ++i) square[i] = pairs(scratch.transposed + ((key + i) * tiles + tile) * kTile);
      transpose(square, square);
      const std::int64_t count = least(kTile, rows - tile * kTile);
      for (int r = 0; r < count; ++r) store_pairs(scratch.scores + (tile * kTile + r) * scratch.stride + key, square[r]);
    }
  }
}

// Scores of a block with the queries as panels, key-major into `out`.
inline void transposed_scores(const Queries& q, const KeyBlock& block, float* out, Prefetcher& ahead) {
  const std::int64_t width = num_panels(block.keys.columns), tiles = (q.rows + kTile - 1) / kTile;
  multiply(q.panels, tiles, width, width, static_cast<const bf16*>(block.keys.data), block.keys.stride, block.keys.rows,
           out, tiles * kTile, false, &ahead);
}

// A tile of 16 queries, one per lane, and its statistics over a span of keys.
struct LaneTile {
  alignas(64) float first[kTile], last[kTile];  // the range of the span's keys that is not masked
  alignas(64) float top[kTile];                 // maximum score up to the span's end
  alignas(64) float peak[kTile];                // largest weight in the span
  std::int64_t tile, rows, keys;
  bool sees_all;

  LaneTile(const Queries& q, std::int64_t tile, std::int64_t start, std::int64_t keys)
      : tile(tile), rows(least(kTile, q.rows - tile * kTile)), keys(keys), sees_all(true) {
    for (std::int64_t r = 0; r < kTile; ++r) {
      const bool is_there = r < rows;
      const std::int64_t from = is_there ? q.first[tile * kTile + r] - start : 0;
      const std::int64_t to = is_there ? q.last[tile * kTile + r] - start : 0;
      sees_all = sees_all && from <= 0 && to >= keys;
      first[r] = static_cast<float>(most(-1, least(from, keys)));
      last[r] = static_cast<float>(most(-1, least(to, keys)));
    }
  }
  // a if the query attends to the key, else other.
  F visible(std::int64_t key, F a, F other) const {
    return within(a, set1(static_cast<float>(key)), load(first), load(last), other);
  }
};

// softmax_step() for one tile of queries with key-major scores, `width` apart, which become weights. One lane per
// query, so no horizontal sums in the inner loop; same bits as softmax_step().
inline void softmax_in_lanes(LaneTile& lanes, float scale, float* scores, std::int64_t width,
                             const SoftmaxState& state) {
  const std::int64_t first_row = lanes.tile * kTile;
  alignas(64) float base[kTile], totals[kTile];
  F highest[4] = {set1(kNone), set1(kNone), set1(kNone), set1(kNone)};
  for (std::int64_t key = 0; key < lanes.keys; ++key) {
    F score = mul(load(scores + key * width), set1(scale));
    if (!lanes.sees_all) score = lanes.visible(key, score, set1(kNone));
    store(scores + key * width, score);
    highest[key % 4] = max(highest[key % 4], score);
  }
  const F own_top = max(max(highest[0], highest[1]), max(highest[2], highest[3]));
  store(lanes.top, own_top);
  for (std::int64_t r = 0; r < kTile; ++r) {
    if (r < lanes.rows) lanes.top[r] = std::fmax(state.top[first_row + r], lanes.top[r]);
    base[r] = lanes.top[r] == kNone ? 0.0f : lanes.top[r];
  }
  store(lanes.peak, exp_of_negative(sub(own_top, load(base))));
  F sums[16];
  for (int lane = 0; lane < 16; ++lane) sums[lane] = zero();
  for (std::int64_t block = 0; block < lanes.keys; block += kKeyBlock) {
    for (int lane = 0; lane < 16; ++lane) {
      F four[4];
      for (int i = 0; i < 4; ++i) {
        float* at = scores + (block + 16 * i + lane) * width;
        four[i] = exp_of_negative(sub(load(at), load(base)));
        store(at, four[i]);
      }
      sums[lane] = add(sums[lane], add(add(four[0], four[1]), add(four[2], four[3])));
    }
  }
  // In the lane order of sum() over a row.
  for (int half = 8; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) sums[lane] = add(sums[lane], sums[lane + half]);
  }
  store(totals, sums[0]);
  for (std::int64_t r = 0; r < lanes.rows; ++r) state.update(first_row + r, lanes.top[r], totals[r]);
}

// Weights of a tile of queries in bf16, interleaved in pairs of keys.
inline void pair_weights(const float* weights, std::int64_t keys, std::int64_t width, std::uint32_t* pairs_out) {
  for (std::int64_t key = 0; key < keys; key += 4) {
    const float* at = weights + key * width;
    const P even = pairs_in_order(load(at), load(at + 2 * width));
    const P odd = pairs_in_order(load(at + width), load(at + 3 * width));
    P one, other;
    interleave(even, odd, one, other);
    store_pairs(pairs_out + key / 2 * width, one);
    store_pairs(pairs_out + (key / 2 + 1) * width, other);
  }
}

// Scores of a block with its keys packed as panels.
inline void plain_scores(const Queries& q, const KeyBlock& block, Panel* panels, const ScoreScratch& scratch) {
  const std::int64_t width = num_panels(block.keys.columns);
  for (std::int64_t tile = 0; tile < block.keys.tiles(); tile += 2) {
    const std::int64_t tiles = least(2, block.keys.tiles() - tile);
    for (std::int64_t i = 0; i < tiles; ++i) load_panels(block.keys, tile + i, panels + i * width, &block.next_keys);
    multiply(panels, tiles, width, width, q.values, q.stride, q.rows, scratch.scores + tile * kTile, scratch.stride,
             false);
  }
}

// Prefetches of a span of blocks, block by block.
struct SpanPrefetcher {
  Prefetcher blocks[kSpanBlocks];
  std::int64_t count = 0;

  SpanPrefetcher() = default;
  SpanPrefetcher(const KeyBlock* span, std::int64_t count, bool with_keys) {
    for (std::int64_t b = 0; b < count; ++b) add(Prefetcher(with_keys ? span[b].next_keys : span[b].next_values));
  }
  void add(const Prefetcher& block) { blocks[count++] = block; }
  // Call while 32 of `channels` channels are multiplied.
  Prefetcher* at(std::int64_t channel, std::int64_t channels) { return &blocks[channel * count / channels]; }
};

inline TransposedRows values_of(const KeyBlock* blocks, std::int64_t count) {
  TransposedRows values;
  for (std::int64_t b = 0; b < count; ++b) values.add(blocks[b].values);
  return values;
}

// attend() with the queries as panels, one lane per query.
inline void attend_in_lanes(const Queries& q, const KeyBlock* blocks, std::int64_t count, std::int64_t start,
                            float scale, Panel* panels, const ScoreScratch& scratch, const SoftmaxState& state) {
  const std::int64_t tiles = (q.rows + kTile - 1) / kTile, width = tiles * kTile, keys = count * kKeyBlock;
  SpanPrefetcher ahead(blocks, count, true);
  for (std::int64_t b = 0; b < count; ++b) {
    transposed_scores(q, blocks[b], scratch.transposed + b * kKeyBlock * width, ahead.blocks[b]);
  }
  auto* weights = reinterpret_cast<std::uint32_t*>(scratch.weights);
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    float* scores = scratch.transposed + tile * kTile;
    LaneTile lanes(q, tile, start, keys);
    softmax_in_lanes(lanes, scale, scores, width, state);
    pair_weights(scores, keys, width, weights + tile * kTile);
  }
  const TransposedRows values = values_of(blocks, count);
  for (std::int64_t channel = 0; channel < values.columns; channel += kColumns) {
    multiply_transposed_by_dots(values, channel, panels, PairedRows{weights, width}, q.rows, state.values + channel,
                            state.stride, ahead.at(channel, values.columns));
  }
}

// Adds a span of at most kSpanBlocks blocks, all but the last of 64 keys, to the state of all query rows.
inline void attend(const Queries& q, const KeyBlock* blocks, std::int64_t count, std::int64_t start, float scale,
                   Panel* panels, const ScoreScratch& scratch, const SoftmaxState& state) {
  const bool has_panels = q.panels != nullptr;
  if (kMultipliesByDots && has_panels) {
    return attend_in_lanes(q, blocks, count, start, scale, panels, scratch, state);
  }
  SpanPrefetcher ahead(blocks, count, has_panels);
  for (std::int64_t b = 0; b < count; ++b) {
    if (has_panels) {
      transposed_scores(q, blocks[b], scratch.transposed, ahead.blocks[b]);
      transpose_scores(q.rows, scratch.block(b));
    } else {
      plain_scores(q, blocks[b], panels, scratch.block(b));
    }
  }
  softmax_step<kSpanBlocks>(q, start, count, scale, scratch, state);
  const TransposedRows values = values_of(blocks, count);
  for (std::int64_t channel = 0; channel < values.columns; channel += kColumns) {
    multiply_transposed_rows(values, channel, panels, scratch.weights, scratch.stride, q.rows, state.values + channel,
                         state.stride, ahead.at(channel, values.columns));
  }
}

// Packed panels of a span of up to `blocks` blocks, shared by many groups of query rows.
struct SpanPanels {
  Panel* keys;    // [blocks, 4 tiles, panels of key_dim]
  Panel* values;  // [channels / 16 rounded up to 2, 2 * blocks]
  std::int64_t key_width, apart;

  static std::int64_t key_panels(std::int64_t key_dim, int blocks) { return 4 * blocks * num_panels(key_dim); }
  static std::int64_t value_panels(std::int64_t value_dim, int blocks) { return 4 * blocks * num_panels(value_dim); }
  Panel* keys_of(std::int64_t block) const { return keys + block * 4 * key_width; }

  void load(std::int64_t number, const KeyBlock& block) const {
    for (std::int64_t tile = 0; tile < block.keys.tiles(); ++tile) {
      load_panels(block.keys, tile, keys_of(number) + tile * key_width);
    }
    for (std::int64_t i = 0; 32 * i < block.values.columns; ++i) {
      load_transposed_panels(block.values, 32 * i, 0, block.keys.rows, values + 2 * (i * apart + number), apart);
    }
  }
};

// attend() over the first `keys` keys of a span of at most kMost blocks with packed panels.
template <int kMost>
inline void attend_loaded(const Queries& q, const SpanPanels& panels, std::int64_t keys, std::int64_t value_dim,
                          std::int64_t start, float scale, const ScoreScratch& scratch, const SoftmaxState& state) {
  const std::int64_t blocks = (keys + kKeyBlock - 1) / kKeyBlock;
  for (std::int64_t b = 0; b < blocks; ++b) {
    const std::int64_t tiles = (least(kKeyBlock, keys - b * kKeyBlock) + kTile - 1) / kTile;
    multiply(panels.keys_of(b), tiles, panels.key_width, panels.key_width, q.values, q.stride, q.rows,
             scratch.block(b).scores, scratch.stride, false);
  }
  softmax_step<kMost>(q, start, blocks, scale, scratch, state);
  multiply(panels.values, (value_dim + kTile - 1) / kTile, panels.apart, num_panels(keys), scratch.weights,
           scratch.stride, q.rows, state.values, state.stride, true);
}

// Merges the state of later keys into that of earlier ones, row by row (flash-decoding reduction).
inline void fold(const SoftmaxState& later, const SoftmaxState& into, std::int64_t rows) {
  for (std::int64_t r = 0; r < rows; ++r) {
    // If all scores are NaN there is no maximum, but the NaN sums must propagate.
    if (later.top[r] == kNone && later.total[r] == 0.0f) continue;
    const float top = std::fmax(into.top[r], later.top[r]);
    const float keep = into.top[r] == kNone ? 0.0f : scalar_exp(into.top[r] - top);
    const float gain = scalar_exp(later.top[r] - top);
    into.top[r] = top;
    into.total[r] = into.total[r] * keep + later.total[r] * gain;
    float* values = into.values + r * into.stride;
    const float* more = later.values + r * later.stride;
    for (std::int64_t c = 0; c < into.stride; c += 16) {
      store(values + c, fma(load(more + c), set1(gain), mul(load(values + c), set1(keep))));
    }
  }
}

// The attention output of one row, rounded to bf16.
inline void finish(const SoftmaxState& state, std::int64_t row, std::int64_t value_dim, bf16* out) {
  const F total = set1(state.total[row]);
  const float* values = state.values + row * state.stride;
  for (std::int64_t c = 0; c < value_dim; c += 16) store_bf16(out + c, div(load(values + c), total), value_dim - c);
}

}  // namespace lowlat::LOWLAT_ISA
