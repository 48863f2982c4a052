// Token sampling: temperature, top-k, top-p, min-p without sorting. Native kernel of lowlat/ops/sampling.py.
//
// The filters keep a prefix of the ranking by logit. It is described by its last logit and how many tokens equal to
// that are kept (Cut). The cut-off for a given probability mass is found by radix selection: masses are summed by the
// first bits of the logits, then, within the bin that reaches the mass, by the next ones. Arithmetic is fp64 without
// fused products, in sums of eight lanes, so that every level gives the same bits.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "../thread_pool.h"
#include "../sampling.h"
#include "training.h"

namespace lowlat::LOWLAT_ISA::sampling {

// Branch-free select (bits of x under the mask), so that loops can be vectorized.
inline double masked(double x, std::uint64_t mask) {
  return std::bit_cast<double>(std::bit_cast<std::uint64_t>(x) & mask);
}

// e^x for x <= 0 to two units in the last place, subnormal results to one; 0 below -746, where it rounds to 0. Plain
// arithmetic that compilers vectorize. The coefficients are those of the Taylor series of e^r on |r| <= ln(2) / 2,
// where the remainder of degree 13 is below 2^-57.
inline double exp_of_negative(double x) {
  constexpr double kShift = 0x1.8p52;  // adding it leaves no mantissa bits for a fraction
  const std::uint64_t is_in_range = -static_cast<std::uint64_t>(x >= -746.0);
  const double bounded = masked(x, is_in_range);
  const double shifted = bounded * 0x1.71547652b82fep0 + kShift, n = shifted - kShift;
  // ln(2) in two parts, the first with spare bits for n.
  const double r = (bounded - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
  double p = 1.0 / 6227020800.0;
  for (const double c : {1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0,
                         1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0}) {
    p = p * r + c;
  }
  // 2^n as two factors, because it may be subnormal; n in [-1077, 0], the last bits of `shifted`.
  const std::uint64_t offset = std::bit_cast<std::uint64_t>(shifted) - std::bit_cast<std::uint64_t>(kShift) + 2048;
  const std::uint64_t half = offset / 2;
  const double low = std::bit_cast<double>((half - 1) << 52), high = std::bit_cast<double>((offset - half - 1) << 52);
  return masked(p * low * high, is_in_range);
}

// Weights of logits.
struct Weighing {
  double largest, temperature;
  double of(float logit) const { return exp_of_negative((logit - largest) / temperature); }
};

// The last tokens kept: all with a larger logit, and the first `ties` of those with this one.
struct Cut {
  float logit;
  double ties;
};

// Maps logits to unsigned integers of the same order; 0 and -0 are equal.
inline std::uint32_t rank_of(float logit) {
  const auto bits = std::bit_cast<std::uint32_t>(logit + 0.0f);
  return bits ^ (-(bits >> 31) | 0x80000000u);
}
inline float logit_of(std::uint32_t rank) {
  return std::bit_cast<float>(rank >> 31 ? rank & 0x7fffffffu : ~rank);
}

// Sum of term(i) in an order that fits vectors of any length up to 8.
template <class Term>
inline double sum_of(std::int64_t first, std::int64_t last, Term&& term) {
  double lanes[8] = {};
  std::int64_t i = first;
  for (; i + 8 <= last; i += 8) {
    LOWLAT_UNROLL
    for (int lane = 0; lane < 8; ++lane) lanes[lane] += term(i + lane);
  }
  for (int lane = 0; i < last; ++i, ++lane) lanes[lane] += term(i);
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

// Calls body(piece, first, last) for every work item, each on one thread, and waits for all.
template <class Body>
inline void for_pieces(Team& team, const DrawPass& p, Body&& body) {
  team.for_chunks(draw_pieces(p.size), 1, [&](std::int64_t piece, std::int64_t) {
    body(piece, piece * kDrawPiece, least(p.size, (piece + 1) * kDrawPiece));
  });
}

// Whether any logit is NaN: without the sign bit, NaN's bits exceed those of infinity.
inline bool any_nan(const float* logits, std::int64_t size) {
  constexpr int kLanes = 16;
  std::uint32_t most[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    LOWLAT_UNROLL
    for (int lane = 0; lane < kLanes; ++lane) {
      const std::uint32_t bits = std::bit_cast<std::uint32_t>(logits[i + lane]) & 0x7fffffffu;
      most[lane] = most[lane] > bits ? most[lane] : bits;
    }
  }
  for (; i < size; ++i) most[0] = std::max(most[0], std::bit_cast<std::uint32_t>(logits[i]) & 0x7fffffffu);
  return *std::max_element(most, most + kLanes) > 0x7f800000u;
}

// NaN if any logit is: comparisons would skip it.
inline float largest_logit(Team& team, const DrawPass& p) {
  for_pieces(team, p, [&](std::int64_t piece, std::int64_t first, std::int64_t last) {
    const float* logits = p.logits + first;
    const bool is_nan = any_nan(logits, last - first);
    p.pieces[piece].largest = is_nan ? __builtin_nanf("") : training::largest_of(logits, last - first);
  });
  float largest = p.pieces[0].largest;
  for (std::int64_t i = 1; i < draw_pieces(p.size) && !std::isnan(largest); ++i) {
    const float other = p.pieces[i].largest;
    largest = std::isnan(other) ? other : std::fmax(largest, other);
  }
  return largest;
}

inline void weigh(Team& team, const DrawPass& p, const Weighing& weighing) {
  for_pieces(team, p, [&](std::int64_t, std::int64_t first, std::int64_t last) {
    const Weighing w = weighing;
    const float* logits = p.logits;
    double* weights = p.weights;
    for (std::int64_t i = first; i < last; ++i) weights[i] = w.of(logits[i]);
  });
}

// What each work item keeps: weights of at least min_p within the cut.
inline void measure(Team& team, const DrawPass& p, const Cut& cut, double min_p) {
  for_pieces(team, p, [&](std::int64_t piece, std::int64_t first, std::int64_t last) {
    const float* logits = p.logits;
    const double* weights = p.weights;
    const double limit = cut.logit;
    p.pieces[piece].above = sum_of(first, last, [=](std::int64_t i) {
      const double weight = weights[i] >= min_p ? weights[i] : 0.0;
      return static_cast<double>(logits[i]) > limit ? weight : 0.0;
    });
    std::int64_t ties = 0;
    for (std::int64_t i = first; i < last && cut.ties > 0; ++i) ties += logits[i] == cut.logit;
    p.pieces[piece].ties = ties;
  });
}

// Sum of the weights a work item keeps; its ties are taken from those left.
inline double kept_in(const DrawPiece& piece, double& ties_left, double tie_weight) {
  const double ties = std::fmin(ties_left, static_cast<double>(piece.ties));
  ties_left -= ties;
  return piece.above + ties * tie_weight;
}

inline double kept_total(const DrawPass& p, const Cut& cut, double tie_weight) {
  double total = 0, ties_left = cut.ties;
  for (std::int64_t i = 0; i < draw_pieces(p.size); ++i) total += kept_in(p.pieces[i], ties_left, tie_weight);
  return total;
}

// The end of a prefix of the ranking with a given mass: its last logit, and the mass above that one.
struct Border {
  float logit;
  double above;
};

// Calls body(i, rank) for the logits with ranks first_rank .. first_rank + span. Most blocks have none.
template <class Body>
inline void for_ranks(const float* logits, std::int64_t first, std::int64_t last, std::uint32_t first_rank,
                      std::uint32_t span, Body&& body) {
  constexpr std::int64_t kBlock = 64;
  for (std::int64_t block = first; block < last; block += kBlock) {
    const std::int64_t end = least(last, block + kBlock);
    std::uint32_t any = 0;
    for (std::int64_t i = block; i < end; ++i) any |= rank_of(logits[i]) - first_rank <= span;
    for (std::int64_t i = block; any != 0 && i < end; ++i) {
      const std::uint32_t rank = rank_of(logits[i]);
      if (rank - first_rank <= span) body(i, rank);
    }
  }
}

// Histogram of the masses of these ranks by `width` of their bits.
template <class Mass>
inline void add_up(const DrawPass& p, std::int64_t first, std::int64_t last, std::uint32_t first_rank,
                   std::uint32_t span, int shift, std::uint32_t width, Mass mass, double* bins) {
  const std::uint32_t bits = (1u << width) - 1;
  std::memset(bins, 0, (bits + 1) * sizeof(double));
  // Runs of one bin are summed in a register: in memory each addition would wait for the previous one.
  std::uint32_t bin = 0;
  double sum = 0;
  for_ranks(p.logits, first, last, first_rank, span, [&](std::int64_t i, std::uint32_t rank) {
    if ((rank >> shift & bits) != bin) {
      bins[bin] += sum;
      sum = 0;
      bin = rank >> shift & bits;
    }
    sum += mass(i);
  });
  bins[bin] += sum;
}

// The shortest prefix whose mass(i) sum to `target`, or all with a nonzero weight, among the logits from `lowest` on.
template <class Mass>
Border border_of(Team& team, const DrawPass& p, Mass mass, double target, float lowest) {
  constexpr int kShift[kDrawLevels] = {21, 10, 0}, kWidth[kDrawLevels] = {11, 11, 10};
  const std::int64_t pieces = draw_pieces(p.size);
  std::uint32_t rank = 0, unknown = ~0u;  // of the cut-off, and its bits still unknown
  double above = 0;
  for (int level = 0; level < kDrawLevels; ++level) {
    double* bins = p.bins + level * pieces * kDrawBinStride;
    const std::uint32_t first_rank = std::max(rank, rank_of(lowest)), span = (rank | unknown) - first_rank;
    for_pieces(team, p, [&](std::int64_t piece, std::int64_t first, std::int64_t last) {
      add_up(p, first, last, first_rank, span, kShift[level], kWidth[level], mass, bins + piece * kDrawBinStride);
    });
    std::uint32_t found = 0;
    double before = above;
    for (std::uint32_t bin = 1u << kWidth[level]; bin-- > 0 && above < target;) {
      double total = 0;
      for (std::int64_t piece = 0; piece < pieces; ++piece) total += bins[piece * kDrawBinStride + bin];
      if (total == 0) continue;
      found = bin;
      before = above;
      above += total;
    }
    above = before;
    rank |= found << kShift[level];
    unknown = (1u << kShift[level]) - 1;
  }
  return {logit_of(rank), above};
}

inline Cut best(Team& team, const DrawPass& p) {
  const auto target = static_cast<double>(p.top_k);
  const Border border = border_of(team, p, [](std::int64_t) { return 1.0; }, target, -__builtin_inff());
  return {border.logit, target - border.above};
}

inline Cut nucleus(Team& team, const DrawPass& p, const Weighing& weighing, const Cut& within) {
  measure(team, p, within, 0);
  const double target = p.top_p * kept_total(p, within, weighing.of(within.logit));
  const Border border = border_of(team, p, [&](std::int64_t i) { return p.weights[i]; }, target, within.logit);
  const double ties = std::fmax(1.0, std::ceil((target - border.above) / weighing.of(border.logit)));
  return {border.logit, border.logit == within.logit ? std::fmin(ties, within.ties) : ties};
}

// The first token of a work item at which the cumulative kept weight exceeds the threshold, or the last one kept.
inline std::int64_t find_in(const DrawPass& p, const Cut& cut, std::int64_t piece, double ties_left, double before,
                            double threshold) {
  const std::int64_t first = piece * kDrawPiece, last = least(p.size, first + kDrawPiece);
  std::int64_t token = first;
  for (std::int64_t i = first; i < last && before <= threshold; ++i) {
    const bool is_tie = p.logits[i] == cut.logit && ties_left > 0;
    ties_left -= is_tie;
    if (!is_tie && !(p.logits[i] > cut.logit)) continue;
    if (p.weights[i] == 0 || p.weights[i] < p.min_p) continue;
    token = i;
    before += p.weights[i];
  }
  return token;
}

inline std::int64_t find(const DrawPass& p, const Cut& cut, double tie_weight) {
  const double threshold = p.number * kept_total(p, cut, tie_weight);
  double before = 0, ties_left = cut.ties;
  std::int64_t piece = 0;
  for (; piece < draw_pieces(p.size) - 1; ++piece) {
    double left = ties_left;
    const double kept = kept_in(p.pieces[piece], left, tie_weight);
    if (before + kept > threshold) break;
    before += kept;
    ties_left = left;
  }
  return find_in(p, cut, piece, ties_left, before, threshold);
}

inline void draw(Team& team, const DrawPass& p) {
  const float largest = largest_logit(team, p);
  if (!std::isfinite(largest)) return;
  const Weighing weighing{largest, p.temperature};
  weigh(team, p, weighing);
  Cut cut{-__builtin_inff(), 0};  // with no weight
  if (0 < p.top_k && p.top_k < p.size) cut = best(team, p);
  if (p.top_p < 1) cut = nucleus(team, p, weighing, cut);
  double tie_weight = weighing.of(cut.logit);
  if (tie_weight < p.min_p) tie_weight = 0;
  measure(team, p, cut, p.min_p);
  if (team.thread() == 0) *p.token = find(p, cut, tie_weight);
}

}  // namespace lowlat::LOWLAT_ISA::sampling
