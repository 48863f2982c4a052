// Sparse attention (DSA) by AMX tiles: query heads of tokens over the KV cache entries that they chose.
//
// Gathering the entries from memory takes most of the time. Neighbouring tokens choose many of the same entries, so
// spans of their contexts are interleaved: entries of about the same positions are then in the second-level cache.
#pragma once

#include "paged_attention.h"

namespace lowlat::LOWLAT_ISA {

#if defined(LOWLAT_AMX)

constexpr std::int64_t kChosenKeys = 32;    // entries of a step of the value products
constexpr std::int64_t kChosenValues = 64;  // channels whose sums stay in tile registers

// Pairs (a[i], b[i]): of every eight elements the first four in `low`, the others in `high`.
inline void interleave_quarters(const bf16* a, const bf16* b, P& low, P& high) {
  const __m512i one = _mm512_loadu_si512(a), other = _mm512_loadu_si512(b);
  low = {_mm512_unpacklo_epi16(one, other)};
  high = {_mm512_unpackhi_epi16(one, other)};
}

// The query heads of tokens that chose their contexts. Reads spans of chosen entries; a span's values are interleaved
// from where the entries lie, which its scores have brought into the second-level cache.
class ChosenReader {
 public:
  // Whether tile products can read the entries in place.
  static bool reads(const CachedKeys& keys) {
    return keys.chosen != nullptr && keys.cache.quantized == 0 && keys.view.key_dim % kColumns == 0 &&
           keys.view.value_dim % kColumns == 0;
  }

  // Of `tokens` tokens, each with `heads` rows in whole tiles of a state. Uses slots 2, 5 to 7, 11 and 13 of `scratch`.
  ChosenReader(const CachedKeys& keys, std::int64_t tokens, std::int64_t heads, Scratch& scratch)
      : keys_(keys), width_(num_panels(keys.view.key_dim)), tiles_((heads + kTile - 1) / kTile) {
    queries_ = scratch.get<Panel>(11, tokens * tiles_ * width_);
    zeros_ = scratch.get<bf16>(13, keys.entry_dim);
    std::memset(zeros_, 0, keys.entry_dim * sizeof(bf16));
    scores_ = scratch.get<float>(5, tiles_ * kSpan * kTile);
    weights_ = scratch.get<Panel>(6, tiles_ * kSteps);
    gathered_ = scratch.get<bf16>(7, kChosenKeys * keys.view.key_dim);
    values_ = scratch.get<Panel>(2, 2 * kSteps * kOfStep);
  }

  void load_queries(std::int64_t token, const Queries& q) {
    const Matrix rows = view(q.values, q.rows, keys_.view.key_dim, q.stride);
    for (std::int64_t tile = 0; tile < tiles_; ++tile) load_panels(rows, tile, panels_of(token) + tile * width_);
  }

  // A split [start, end) of the contexts of all tokens, keys.chosen [tokens, topk], into their cleared states.
  void attend_interleaved(std::int64_t tokens, std::int64_t topk, std::int64_t start, std::int64_t end,
                          const SoftmaxState& state) {
    const std::int64_t rows = tiles_ * kTile;
    for (; start < end; start += kSpan) {
      const std::int64_t stop = least(end, start + kSpan);
      for (std::int64_t t = 0; t < tokens; ++t) {
        const std::int32_t* chosen = keys_.chosen + t * topk;
        const bool is_last = t + 1 == tokens;
        const std::int32_t* later = is_last ? keys_.chosen + stop : chosen + topk + start;
        const std::int64_t count = is_last ? least(kSpan, end - stop) : stop - start;
        attend(t, chosen, start, stop, later, count, state.from(t * rows));
      }
    }
    restore_order(tokens * rows, state);
  }

 private:
  static constexpr std::int64_t kSteps = kSpan / kChosenKeys, kOfStep = kChosenValues / kTile;

  // Adds a token's chosen entries [start, end), at most a span, to its state, whose values are in the order of
  // interleave_quarters(). The `count_later` entries `later` are prefetched meanwhile.
  void attend(std::int64_t token, const std::int32_t* chosen, std::int64_t start, std::int64_t end,
              const std::int32_t* later, std::int64_t count_later, const SoftmaxState& state) {
    count_ = end - start;
    steps_ = (count_ + kChosenKeys - 1) / kChosenKeys;
    for (std::int64_t i = 0; i < steps_ * kChosenKeys; ++i) entries_[i] = i < count_ ? entry(chosen[start + i]) : zeros_;
    later_ = later;
    end_later_ = later + count_later;
    configure_tiles(kTileRows, kTileRows);
    for (std::int64_t i = 0; i < steps_ * kChosenKeys; i += kChosenKeys) score(panels_of(token), i);
    for (std::int64_t tile = 0; tile < tiles_; ++tile) weigh(tile, state);
    for (std::int64_t step = 0; step < steps_; ++step) interleave_values(step, 0);
    for (std::int64_t channel = 0; channel < keys_.view.value_dim; channel += kChosenValues) {
      for (std::int64_t tile = 0; tile < tiles_; ++tile) add_values(tile, channel, state);
    }
    prefetch_later(kSpan);
  }

  // Puts the values of a state into the order of the channels.
  void restore_order(std::int64_t rows, const SoftmaxState& state) const {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i last = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t c = 0; c < keys_.view.value_dim; c += kColumns) {
        float* at = state.values + r * state.stride + c;
        const __m512 low = _mm512_loadu_ps(at), high = _mm512_loadu_ps(at + kTile);
        _mm512_storeu_ps(at, _mm512_permutex2var_ps(low, first, high));
        _mm512_storeu_ps(at + kTile, _mm512_permutex2var_ps(low, last, high));
      }
    }
  }

  Panel* panels_of(std::int64_t token) const { return queries_ + token * tiles_ * width_; }
  const bf16* entry(std::int32_t position) const {
    return reinterpret_cast<const bf16*>(cached_row(keys_.cache, keys_.pages, position));
  }

  void prefetch_later(std::int64_t entries) {
    for (; entries > 0 && later_ < end_later_; --entries) {
      const auto* at = reinterpret_cast<const char*>(entry(*later_++));
      // the processor fetches lines in pairs
      for (std::int64_t byte = 0; byte < keys_.cache.row_bytes; byte += 128) prefetch_far(at + byte);
    }
  }

  // Products of 32 entries with all query heads: scores_ [tile, entry, head]. With sums in one tile register, every
  // product would wait for the last one.
  void score(const Panel* queries, std::int64_t entry) {
    const std::int64_t key_dim = keys_.view.key_dim;
    for (std::int64_t i = 0; i < kChosenKeys; ++i) {
      const bf16* from = entries_[entry + i] + keys_.view.key;
      bf16* to = gathered_ + i * key_dim;
      for (std::int64_t c = 0; c < key_dim; c += kColumns) store_pairs(to + c, pairs(from + c));
      if (i % 2 == 0) prefetch_later(1);
    }
    const long pitch = static_cast<long>(key_dim * sizeof(bf16));
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      const Panel* q = queries + tile * width_;
      const bf16* others = gathered_ + kTile * key_dim;
      float* out = scores_ + (tile * kSpan + entry) * kTile;
      _tile_zero(0);
      _tile_zero(1);
      for (std::int64_t i = 0; i < width_; ++i) {
        _tile_loadd(6, q + i, 64);
        _tile_loadd(4, gathered_ + i * kColumns, pitch);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, others + i * kColumns, pitch);
        _tile_dpbf16ps(1, 5, 6);
      }
      _tile_stored(0, out, 64);
      _tile_stored(1, out + kTile * kTile, 64);
    }
  }

  // Online softmax of a tile of heads: weights_ [tile, step] as rows of 32 per head.
  void weigh(std::int64_t tile, const SoftmaxState& state) {
    float* scores = scores_ + tile * kSpan * kTile;
    const std::int64_t keys = steps_ * kChosenKeys, first = tile * kTile;
    for (std::int64_t key = count_; key < keys; ++key) store(scores + key * kTile, set1(kNone));
    F highest[4] = {set1(kNone), set1(kNone), set1(kNone), set1(kNone)};
    const F scale = set1(keys_.scale);
    for (std::int64_t key = 0; key < keys; key += 4) {
      for (int i = 0; i < 4; ++i) {
        const F score = mul(load(scores + (key + i) * kTile), scale);
        store(scores + (key + i) * kTile, score);
        highest[i] = max(highest[i], score);
      }
    }
    alignas(64) float top[kTile], base[kTile], total[kTile];
    store(top, max(max(highest[0], highest[1]), max(highest[2], highest[3])));
    for (int r = 0; r < kTile; ++r) {
      top[r] = std::fmax(state.top[first + r], top[r]);
      base[r] = top[r] == kNone ? 0.0f : top[r];
    }
    const F of_lane = load(base);
    F sums[4] = {zero(), zero(), zero(), zero()};
    for (std::int64_t step = 0; step < steps_; ++step) {
      Panel& out = weights_[tile * kSteps + step];
      for (int key = 0; key < kChosenKeys; key += 4) {
        F four[4];
        for (int i = 0; i < 4; ++i) {
          four[i] = exp_of_negative(sub(load(scores + (step * kChosenKeys + key + i) * kTile), of_lane));
          sums[i] = add(sums[i], four[i]);
        }
        P one, other;
        interleave(pairs_in_order(four[0], four[2]), pairs_in_order(four[1], four[3]), one, other);
        out[key / 2] = one;
        out[key / 2 + 1] = other;
      }
      transpose(out, out);
    }
    store(total, add(add(sums[0], sums[1]), add(sums[2], sums[3])));
    for (int r = 0; r < kTile; ++r) state.update(first + r, top[r], total[r]);
  }

  // Where the values of a step are, 64 channels of them; those of the next channels go elsewhere.
  Panel* values_of(std::int64_t step, std::int64_t channel) const {
    return values_ + (channel / kChosenValues % 2 * kSteps + step) * kOfStep;
  }
  bool is_wide(std::int64_t channel) const { return keys_.view.value_dim - channel > kColumns; }

  // Pairs of a step's entries as tiles of 16 channels, 64 channels or less.
  void interleave_values(std::int64_t step, std::int64_t channel) {
    const bf16* const* entries = entries_ + step * kChosenKeys;
    const std::int64_t at = keys_.view.value + channel;
    Panel* out = values_of(step, channel);
    for (int pair = 0; pair < kTile; ++pair) {
      const bf16* one = entries[2 * pair] + at;
      const bf16* other = entries[2 * pair + 1] + at;
      interleave_quarters(one, other, out[0][pair], out[1][pair]);
      if (is_wide(channel)) interleave_quarters(one + kColumns, other + kColumns, out[2][pair], out[3][pair]);
    }
    prefetch_later(2);
  }

  // Adds the weighted values of 64 channels or less to the state of a tile of heads. Vector units interleave the next
  // values while tiles are multiplied.
  void add_values(std::int64_t tile, std::int64_t channel, const SoftmaxState& state) {
    const bool has_four = is_wide(channel), has_next = tile == 0 && channel + kChosenValues < keys_.view.value_dim;
    const long pitch = static_cast<long>(state.stride * sizeof(float));
    float* out = state.values + tile * kTile * state.stride + channel;
    _tile_loadd(0, out, pitch);
    _tile_loadd(1, out + kTile, pitch);
    if (has_four) {
      _tile_loadd(2, out + 2 * kTile, pitch);
      _tile_loadd(3, out + 3 * kTile, pitch);
    }
    for (std::int64_t step = 0; step < steps_; ++step) {
      const Panel* values = values_of(step, channel);
      _tile_loadd(4, weights_ + tile * kSteps + step, 64);
      _tile_loadd(6, values, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, values + 1, 64);
      _tile_dpbf16ps(1, 4, 7);
      if (has_four) {
        _tile_loadd(6, values + 2, 64);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(7, values + 3, 64);
        _tile_dpbf16ps(3, 4, 7);
      }
      if (has_next) interleave_values(step, channel + kChosenValues);
    }
    _tile_stored(0, out, pitch);
    _tile_stored(1, out + kTile, pitch);
    if (!has_four) return;
    _tile_stored(2, out + 2 * kTile, pitch);
    _tile_stored(3, out + 3 * kTile, pitch);
  }

  const CachedKeys& keys_;
  std::int64_t width_, tiles_, count_ = 0, steps_ = 0;
  const std::int32_t *later_ = nullptr, *end_later_ = nullptr;
  const bf16* entries_[kSpan];  // of the span, then zeros_ up to whole steps
  bf16* zeros_;
  Panel* queries_;   // [tokens, tiles, width]
  float* scores_;    // [tiles, kSpan, 16]
  Panel* weights_;   // [tiles, kSteps]
  bf16* gathered_;   // [32, key_dim]
  Panel* values_;    // [2, kSteps, 4]
};

#endif

}  // namespace lowlat::LOWLAT_ISA
