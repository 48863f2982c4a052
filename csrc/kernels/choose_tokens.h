// Exact top-k of a row of index scores: the k largest, of equal scores the lowest positions, in ascending order.
//
// No sorting: a bound that at least k scores reach discards most of them, and the k-th largest of the rest is found by
// radix selection on the bits of the scores.
#pragma once

#include <bit>

#include "common.h"
#include "../workspace.h"

namespace lowlat::LOWLAT_ISA {

// Maps scores to unsigned integers of the same order; 0 and -0 are equal.
inline std::uint32_t score_rank(float score) {
  const auto bits = std::bit_cast<std::uint32_t>(score + 0.0f);
  return bits ^ (-(bits >> 31) | 0x80000000u);
}
inline float score_of_rank(std::uint32_t rank) {
  return std::bit_cast<float>(rank >> 31 ? rank & 0x7fffffffu : ~rank);
}

// The k-th largest of `count` >= k >= 1 ranks, whose order changes.
inline std::uint32_t kth_largest(std::uint32_t* ranks, std::int64_t count, std::int64_t k) {
  constexpr int kShifts[] = {21, 10, 0}, kWidths[] = {11, 11, 10};
  std::uint32_t prefix = 0;
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = kShifts[pass];
    const std::uint32_t mask = (1u << kWidths[pass]) - 1;
    std::uint32_t counts[2048] = {};
    for (std::int64_t i = 0; i < count; ++i) ++counts[ranks[i] >> shift & mask];
    std::uint32_t digit = mask;
    for (; counts[digit] < k; --digit) k -= counts[digit];
    prefix |= digit << shift;
    std::int64_t kept = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      ranks[kept] = ranks[i];
      kept += (ranks[i] >> shift & mask) == digit;
    }
    count = kept;
  }
  return prefix;
}

// A score that at least k of the `count` scores reach, by the maxima of sets of them; count > k. Uses slot 6 of
// `scratch`.
inline float lower_bound_of_choice(const float* scores, std::int64_t count, std::int64_t k, Scratch& scratch) {
  const std::int64_t vectors = (count + kTile - 1) / kTile, per_set = most(1, vectors * kTile / (4 * k));
  const std::int64_t sets = (vectors + per_set - 1) / per_set * kTile;
  auto* ranks = scratch.get<std::uint32_t>(6, sets);
  std::int64_t at = 0;
  for (std::int64_t v = 0; v < vectors; v += per_set) {
    F highest = load(scores + v * kTile);
    for (std::int64_t i = v + 1; i < least(v + per_set, vectors); ++i) highest = max(highest, load(scores + i * kTile));
    alignas(64) float lanes[kTile];
    store(lanes, highest);
    for (int lane = 0; lane < kTile; ++lane) ranks[at++] = score_rank(lanes[lane]);
  }
  return score_of_rank(kth_largest(ranks, sets, k));
}

// out [k]: the choice among count > k >= 1 scores, which are not NaN; `scores` is writable up to a multiple of 16. Uses
// slots 6 and 7 of `scratch`.
inline void choose_tokens(float* scores, std::int64_t count, std::int64_t k, Scratch& scratch, std::int32_t* out) {
  for (std::int64_t i = count; i % kTile != 0; ++i) scores[i] = -__builtin_inff();
  const F bound = set1(lower_bound_of_choice(scores, count, k, scratch));
  auto* found = scratch.get<std::int32_t>(7, 2 * (count + kTile));
  auto* ranks = reinterpret_cast<std::uint32_t*>(found + count + kTile);
  std::int64_t candidates = 0;
  for (std::int64_t first = 0; first < count; first += kTile) {
    for (std::uint32_t lanes = lanes_at_least(load(scores + first), bound); lanes != 0; lanes &= lanes - 1) {
      found[candidates++] = static_cast<std::int32_t>(first + std::countr_zero(lanes));
    }
  }
  for (std::int64_t i = 0; i < candidates; ++i) ranks[i] = score_rank(scores[found[i]]);
  const float last = score_of_rank(kth_largest(ranks, candidates, k));
  std::int64_t equal = k;  // chosen scores equal to the last one
  for (std::int64_t i = 0; i < candidates; ++i) equal -= scores[found[i]] > last;
  for (std::int64_t i = 0; i < candidates; ++i) {
    const float score = scores[found[i]];
    if (score < last || (score == last && equal-- <= 0)) continue;
    *out++ = found[i];
  }
}

}  // namespace lowlat::LOWLAT_ISA
