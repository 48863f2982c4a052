// Exact top-k of a row of index scores: the k largest, of equal scores the lowest positions, in ascending order.
//
// No sorting: a bound that at least k scores reach discards most of them, and bisection on the bits of the others finds
// the last one chosen.
#pragma once

#include <bit>

#include "common.h"
#include "../workspace.h"

namespace lowlat::LOWLAT_ISA {

constexpr float kLowestScore = -3.40282347e38f, kUnseen = -__builtin_inff();

// Maps scores to unsigned integers of the same order; 0 and -0 are equal.
inline std::uint32_t score_rank(float score) {
  const auto bits = std::bit_cast<std::uint32_t>(score + 0.0f);
  return bits ^ (-(bits >> 31) | 0x80000000u);
}
inline float score_of_rank(std::uint32_t rank) {
  return std::bit_cast<float>(rank >> 31 ? rank & 0x7fffffffu : ~rank);
}

// Scores in whole vectors, padded with -inf.
struct ScoreRow {
  float* scores;
  std::int64_t vectors;

  std::int64_t count_at_least(float bound) const {
    std::int64_t count = 0;
    for (std::int64_t v = 0; v < vectors; ++v) count += std::popcount(lanes_at_least(load(scores + v * kTile), set1(bound)));
    return count;
  }
  float highest() const {
    F top = load(scores);
    for (std::int64_t v = 1; v < vectors; ++v) top = max(top, load(scores + v * kTile));
    return largest(top);
  }
};

// Appends the numbers `first` + lane, or lanes of `values`, of the set bits of `lanes`; may write 16 elements.
inline std::int32_t* append_numbers(std::uint32_t lanes, std::int32_t first, std::int32_t* out) {
#if defined(LOWLAT_AVX512)
  const __m512i number = _mm512_add_epi32(_mm512_cvtps_epi32(lane_numbers().v), _mm512_set1_epi32(first));
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(static_cast<__mmask16>(lanes), number));
  return out + std::popcount(lanes);
#else
  for (; lanes != 0; lanes &= lanes - 1) *out++ = first + std::countr_zero(lanes);
  return out;
#endif
}
inline void append_values(std::uint32_t lanes, const float* values, float* out) {
#if defined(LOWLAT_AVX512)
  _mm512_storeu_ps(out, _mm512_maskz_compress_ps(static_cast<__mmask16>(lanes), _mm512_loadu_ps(values)));
#else
  for (; lanes != 0; lanes &= lanes - 1) *out++ = values[std::countr_zero(lanes)];
#endif
}
// Appends `numbers` of the set bits of `lanes`, and writes no others.
inline std::int32_t* append_numbers_of(std::uint32_t lanes, const std::int32_t* numbers, std::int32_t* out) {
#if defined(LOWLAT_AVX512)
  const __m512i chosen = _mm512_maskz_compress_epi32(static_cast<__mmask16>(lanes), _mm512_loadu_si512(numbers));
  _mm512_mask_storeu_epi32(out, static_cast<__mmask16>((1u << std::popcount(lanes)) - 1), chosen);
  return out + std::popcount(lanes);
#else
  for (; lanes != 0; lanes &= lanes - 1) *out++ = numbers[std::countr_zero(lanes)];
  return out;
#endif
}

// A score that at least k of the row's scores reach, and not many more, by the maxima of sets of them; `whole` of the
// row's vectors have no padding. Uses slot 6 of `scratch`.
inline float lower_bound_of_choice(const ScoreRow& row, std::int64_t whole, std::int64_t k, Scratch& scratch) {
  constexpr int kSteps = 20;
  const std::int64_t per_set = most(1, row.vectors * kTile / (4 * k));
  ScoreRow sets{scratch.get<float>(6, (row.vectors + per_set - 1) / per_set * kTile), 0};
  F lowest = set1(-kUnseen);
  for (std::int64_t v = 0; v < row.vectors; v += per_set) {
    F highest = load(row.scores + v * kTile);
    for (std::int64_t i = v + 1; i < least(v + per_set, row.vectors); ++i) highest = max(highest, load(row.scores + i * kTile));
    store(sets.scores + sets.vectors++ * kTile, highest);
    if (v < whole) lowest = min(lowest, highest);
  }
  float low = -largest(sub(zero(), lowest)), high = sets.highest();
  if (sets.count_at_least(low) < k) return kLowestScore;
  for (int step = 0; step < kSteps; ++step) {
    const float middle = 0.5f * low + 0.5f * high;
    const std::int64_t count = sets.count_at_least(middle);
    (count >= k ? low : high) = middle;
    if (count >= k && count <= k + k / 16) break;
  }
  return low;
}

// The k-th largest score of a row, all of which are at least `low`; or a score that exactly k reach.
inline float last_of_choice(const ScoreRow& row, std::int64_t k, float low) {
  std::uint32_t first = score_rank(low), end = score_rank(row.highest()) + 1;
  while (end - first > 1) {
    const std::uint32_t middle = first + (end - first) / 2;
    const std::int64_t count = row.count_at_least(score_of_rank(middle));
    (count >= k ? first : end) = middle;
    if (count == k) break;
  }
  return score_of_rank(first);
}

// out [k]: the choice among count > k >= 1 scores, which are not NaN; `scores` is writable up to a multiple of 16. Uses
// slots 6 and 7 of `scratch`.
inline void choose_tokens(float* scores, std::int64_t count, std::int64_t k, Scratch& scratch, std::int32_t* out) {
  const ScoreRow row{scores, (count + kTile - 1) / kTile};
  for (std::int64_t i = count; i < row.vectors * kTile; ++i) scores[i] = kUnseen;
  const float bound = lower_bound_of_choice(row, count / kTile, k, scratch);
  const std::int64_t room = row.vectors * kTile + kTile;
  auto* found = scratch.get<std::int32_t>(7, 2 * room);
  ScoreRow candidates{reinterpret_cast<float*>(found + room), 0};
  std::int32_t* end = found;
  for (std::int64_t first = 0; first < count; first += kTile) {
    const std::uint32_t lanes = lanes_at_least(load(scores + first), set1(bound));
    append_values(lanes, scores + first, candidates.scores + (end - found));
    end = append_numbers(lanes, static_cast<std::int32_t>(first), end);
  }
  candidates.vectors = (end - found + kTile - 1) / kTile;
  for (std::int64_t i = end - found; i < candidates.vectors * kTile; ++i) candidates.scores[i] = kUnseen;
  const float last = last_of_choice(candidates, k, bound);
  const auto lanes_of = [&](std::int64_t v, std::uint32_t& above, std::uint32_t& equal) {
    const F some = load(candidates.scores + v * kTile);
    const std::uint32_t reach = lanes_at_least(some, set1(last)), below = lanes_at_least(set1(last), some);
    above = reach & ~below;
    equal = reach & below;
  };
  std::uint32_t above, equal;
  std::int64_t missing = k;  // chosen scores equal to the last one
  for (std::int64_t v = 0; v < candidates.vectors; ++v) {
    lanes_of(v, above, equal);
    missing -= std::popcount(above);
  }
  for (std::int64_t v = 0; v < candidates.vectors; ++v) {
    lanes_of(v, above, equal);
    while (std::popcount(equal) > missing) equal &= ~std::bit_floor(equal);
    missing -= std::popcount(equal);
    out = append_numbers_of(above | equal, found + v * kTile, out);
  }
}

}  // namespace lowlat::LOWLAT_ISA
