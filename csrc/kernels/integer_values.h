// Weighted sum of int8 values in attention by integer dot products (VNNI).
//
// A softmax weight times the scale of a key's 64 channels is quantized to a byte: 254ths of the largest possible
// product of that query in the span. Rounding to nearest would lose many small weights. Dithering is used instead: an
// offset that takes 64 evenly spaced values from key to key is added before truncation, so that sums over keys are
// unbiased. If one weight is a large part of a query's total so far, its span is computed with 8 more bits, in
// separate products.
#pragma once

#include "integer_scores.h"

namespace lowlat::LOWLAT_ISA {

#if defined(LOWLAT_AVX512)

constexpr int kQuad = 4;         // keys that share a 32-bit word
constexpr int kQuadsAtOnce = 4;  // words per product between two prefetches
constexpr float kLargestByte = 254.0f, kBelowOne = 256.0f;
constexpr float kWhole = 12582912.0f;  // adding it rounds numbers below 65536 to integers in the low mantissa bits
constexpr float kPeak = 1.0f / 16;  // of the total weight so far: above it, more bits are used

// Blocks that share one softmax step, all but the last of 64 keys.
struct IntegerSpan {
  IntegerBlock blocks[kSpanBlocks];
  std::int64_t count = 0, keys = 0;

  void add(const IntegerBlock& block) {
    blocks[count++] = block;
    keys += block.count;
  }
  std::int64_t quads() const { return round_up(keys, kQuad * kQuadsAtOnce) / kQuad; }
  float scale(std::int64_t group, std::int64_t key) const {
    return blocks[key / kKeyBlock].value_scales[group * kKeyBlock + key % kKeyBlock];
  }
};

// Quantized weights of queries, four keys per word, [groups, quads, width].
struct ByteWeights {
  std::uint32_t* high;
  std::uint32_t* low;  // low bytes (256ths), of tiles with peaks
  bool* has_peaks;     // [tiles]
  float* quantum;      // value of one quantization step, [groups, width]
  float* largest;      // largest scale of a group's keys, [groups]
  float* shares;       // key scales over the largest, [groups, kSpan]
  float* inverse_scale;  // 1 / largest key scale each query of a tile attends to, [groups, 16]
  std::int64_t groups = 0, quads = 0, width = 0;

  std::int64_t at(std::int64_t group, std::int64_t quad) const { return (group * quads + quad) * width; }
};

// Dither: the offset added to a key's weight before truncation, in 256ths: the key's last six bits in reverse (van
// der Corput sequence).
inline float added_fraction(std::int64_t key) {
  int reversed = 0;
  for (int bit = 0; bit < 6; ++bit) reversed |= (static_cast<int>(key) >> bit & 1) << (5 - bit);
  return static_cast<float>(4 * reversed + 2);
}

inline void share_scales(const IntegerSpan& span, const ByteWeights& out) {
  const auto scales = [&](std::int64_t group, std::int64_t key) {
    return load(span.blocks[key / kKeyBlock].value_scales + group * kKeyBlock + key % kKeyBlock);
  };
  for (std::int64_t g = 0; g < out.groups; ++g) {
    F highest = zero();
    for (std::int64_t key = 0; key < span.count * kKeyBlock; key += kTile) highest = max_bits(highest, scales(g, key));
    out.largest[g] = largest_bits(highest);
    const F inverse_scale = div(set1(1.0f), set1(out.largest[g]));
    for (std::int64_t key = 0; key < span.count * kKeyBlock; key += kTile) {
      store(out.shares + g * kSpan + key, mul(scales(g, key), inverse_scale));
    }
  }
}

// The largest scale of a group among the keys that each query of a tile attends to.
inline F seen_scale(const LaneTile& lanes, const IntegerSpan& span, std::int64_t group) {
  const F first = load(lanes.first), last = load(lanes.last);
  F highest = zero();
  for (std::int64_t key = 0; key < span.keys; ++key) {
    const F number = set1(static_cast<float>(key));
    highest = max_bits(highest, within(set1(span.scale(group, key)), number, first, last, zero()));
  }
  return highest;
}

// Bytes of the weights [keys, width] of a tile of queries times `factor` per query. is_spread 1: dither and truncate;
// 0: the fraction goes into `low`.
template <bool sees_all, bool has_low>
inline void make_bytes(const IntegerSpan& span, const float* weights, F factor, F is_spread, std::int64_t first_row,
                       const ByteWeights& out) {
  const P has_peak = bits_where_zero(is_spread);
  for (std::int64_t quad = 0; quad < out.quads; ++quad) {
    F four[kQuad], added[kQuad];
    for (int i = 0; i < kQuad; ++i) {
      const std::int64_t key = quad * kQuad + i;
      four[i] = mul(load(weights + key * out.width), factor);
      added[i] = fma(is_spread, set1(added_fraction(key % kKeyBlock)), set1(kWhole));
    }
    for (std::int64_t g = 0; g < out.groups; ++g) {
      P bytes[kQuad];
      for (int i = 0; i < kQuad; ++i) {
        const std::int64_t key = quad * kQuad + i;
        F share = set1(out.shares[g * kSpan + key]);
        if constexpr (!sees_all) {
          share = mul(set1(span.scale(g, key)), load(out.inverse_scale + g * kTile));
        }
        bytes[i] = bits(fma(four[i], share, added[i]));
      }
      const std::int64_t at = out.at(g, quad) + first_row;
      store_pairs(out.high + at, gather_bytes<1>(bytes[0], bytes[1], bytes[2], bytes[3]));
      if constexpr (has_low) {
        store_pairs(out.low + at, both(gather_bytes<0>(bytes[0], bytes[1], bytes[2], bytes[3]), has_peak));
      }
    }
  }
}

// The weights [keys, width] of a tile of queries as bytes.
inline void round_weights(const LaneTile& lanes, const IntegerSpan& span, const float* weights,
                          const SoftmaxState& state, const ByteWeights& out) {
  const std::int64_t first_row = lanes.tile * kTile;
  alignas(64) float is_spread[kTile];
  bool has_peaks = false;
  for (std::int64_t r = 0; r < kTile; ++r) {
    const bool has_peak = r < lanes.rows && lanes.peak[r] > kPeak * state.total[first_row + r];
    is_spread[r] = has_peak ? 0.0f : 1.0f;
    has_peaks = has_peaks || has_peak;
  }
  const F peak = load(lanes.peak);
  for (std::int64_t g = 0; g < out.groups; ++g) {
    const F largest = lanes.sees_all ? set1(out.largest[g]) : seen_scale(lanes, span, g);
    store(out.quantum + g * out.width + first_row, mul(mul(peak, largest), set1(1 / kLargestByte)));
    store(out.inverse_scale + g * kTile, div(set1(1.0f), largest));
  }
  // A fully masked query has no peak and no weights.
  const F factor = div(set1(kLargestByte * kBelowOne), max(peak, set1(1e-30f)));
  const F spread = load(is_spread);
  out.has_peaks[lanes.tile] = has_peaks;
  if (lanes.sees_all) {
    has_peaks ? make_bytes<true, true>(span, weights, factor, spread, first_row, out)
              : make_bytes<true, false>(span, weights, factor, spread, first_row, out);
  } else {
    has_peaks ? make_bytes<false, true>(span, weights, factor, spread, first_row, out)
              : make_bytes<false, false>(span, weights, factor, spread, first_row, out);
  }
}

// 64 channels from `channel` of a span's entries, four keys per word: vector k of a quad holds channels 16 l + 4 k to
// 16 l + 4 k + 3 in its quarter l. Past the end the last key is repeated: its weights are zero.
inline void transpose_bytes(const IntegerSpan& span, std::int64_t channel, std::int64_t channels, P (*quads)[kQuad]) {
  for (std::int64_t b = 0; b < span.count; ++b) {
    const IntegerBlock& block = span.blocks[b];
    const std::uint8_t* first = block.values + channel;
    const std::int64_t count = block.count, step = block.row_bytes;
    for (std::int64_t key = 0; key < round_up(count, kQuad * kQuadsAtOnce); key += kQuad, ++quads) {
      P rows[kQuad];
      for (int i = 0; i < kQuad; ++i) {
        const std::uint8_t* row = first + least(key + i, count - 1) * step;
        rows[i] = channels >= kScaled ? pairs(row) : load_pairs(reinterpret_cast<const bf16*>(row), (channels + 1) / 2);
      }
      interleave_bytes(rows, *quads);
    }
  }
}

// out[r][channel] += worth[r] * sum over keys of byte[r] * key[channel], for T queries and `tiles` <= 4 tiles of
// channels.
template <int T>
inline void multiply_bytes(const P (*panels)[kQuad], std::int64_t quads, const std::uint32_t* words,
                           std::int64_t width, const float* quantum, float gain, float* out, std::int64_t out_stride,
                           int tiles, Prefetcher& ahead) {
  P sums[kQuad][T];
  LOWLAT_UNROLL
  for (int k = 0; k < kQuad; ++k) {
    LOWLAT_UNROLL
    for (int t = 0; t < T; ++t) sums[k][t] = zero_pairs();
  }
  for (std::int64_t first = 0; first < quads; first += kQuadsAtOnce) {
    ahead.ask(kLinesAhead);
    for (int quad = 0; quad < kQuadsAtOnce; ++quad, ++panels, words += width) {
      LOWLAT_UNROLL
      for (int t = 0; t < T; ++t) {
        const P word = set1_pair(words[t]);
        LOWLAT_UNROLL
        for (int k = 0; k < kQuad; ++k) sums[k][t] = dot_bytes(sums[k][t], word, panels[0][k]);
      }
    }
  }
  LOWLAT_UNROLL
  for (int t = 0; t < T; ++t) {
    P of_row[kQuad] = {sums[0][t], sums[1][t], sums[2][t], sums[3][t]};
    transpose_quarters(of_row);
    const F scale = set1(quantum[t] * gain);
    LOWLAT_UNROLL
    for (int k = 0; k < kQuad; ++k) {
      float* at = out + t * out_stride + k * kTile;
      if (k < tiles) store(at, fma(integers_to_float(of_row[k]), scale, load(at)));
    }
  }
}

// Adds the weighted values of a span to the state of the queries.
inline void add_values(const IntegerSpan& span, const ByteWeights& weights, std::int64_t rows, std::int64_t value_dim,
                       P (*panels)[kQuad], const SoftmaxState& state, SpanPrefetcher& ahead) {
  constexpr int kRows = 6;  // 24 accumulators stay in registers
  for (std::int64_t channel = 0, g = 0; channel < value_dim; channel += kScaled, ++g) {
    const std::int64_t channels = least(kScaled, value_dim - channel);
    const int tiles = static_cast<int>((channels + kTile - 1) / kTile);
    Prefetcher& prefetches = *ahead.at(channel, value_dim);
    transpose_bytes(span, channel, channels, panels);
    for (std::int64_t first = 0; first < rows; first += kTile) {
      const std::int64_t last = least(rows, first + kTile), step = even_block(last - first, kRows);
      const bool has_peaks = weights.has_peaks[first / kTile];
      for (std::int64_t row = first; row < last; row += step) {
        float* out = state.values + row * state.stride + channel;
        const float* quantum = weights.quantum + g * weights.width + row;
        const std::int64_t at = weights.at(g, 0) + row;
        const auto multiply = [&](const std::uint32_t* words, float gain) {
          with_tokens<kRows>(least(step, last - row), [&]<int T>() {
            multiply_bytes<T>(panels, weights.quads, words + at, weights.width, quantum, gain, out, state.stride, tiles,
                              prefetches);
          });
        };
        multiply(weights.high, 1.0f);
        if (has_peaks) multiply(weights.low, 1 / kBelowOne);
      }
    }
  }
}

// Scratch of attend_integers().
struct IntegerScratch {
  float* scores;  // [kSpan, tiles * 16]
  ByteWeights weights;
  P (*panels)[kQuad];  // [kSpan / 4]
};

// Adds a span of keys that starts at `start` to the state of the query rows. Later keys are prefetched during the
// scores, later values during the values; the two may be the same memory.
inline void attend_integers(const Queries& q, const IntegerQueries& rounded, const IntegerSpan& span,
                            std::int64_t value_dim, std::int64_t start, float scale, const IntegerScratch& scratch,
                            const SoftmaxState& state, SpanPrefetcher& keys_ahead, SpanPrefetcher& values_ahead) {
  const std::int64_t width = rounded.tiles * kTile;
  for (std::int64_t b = 0; b < span.count; ++b) {
    integer_scores(rounded, span.blocks[b], scratch.scores + b * kKeyBlock * width, keys_ahead.blocks[b]);
  }
  ByteWeights weights = scratch.weights;
  weights.quads = span.quads();
  share_scales(span, weights);
  for (std::int64_t tile = 0; tile < rounded.tiles; ++tile) {
    float* scores = scratch.scores + tile * kTile;
    LaneTile lanes(q, tile, start, span.count * kKeyBlock);
    softmax_in_lanes(lanes, scale, scores, width, state);
    round_weights(lanes, span, scores, state, weights);
  }
  add_values(span, weights, q.rows, value_dim, scratch.panels, state, values_ahead);
}

#endif

}  // namespace lowlat::LOWLAT_ISA
