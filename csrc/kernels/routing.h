// Expert routing: group-limited top-k from gate logits. Native kernel of lowlat/ops/routing.py; ties go to the lowest
// expert id.
#pragma once

#include <cmath>
#include <cstring>

#include "../model.h"
#include "common.h"

namespace lowlat::LOWLAT_ISA {

// Sigmoid or softmax of the logits, in place.
inline void gate_scores(const Router& router, float* values) {
  if (router.is_sigmoid) {
    for (std::int64_t e = 0; e < router.experts; ++e) values[e] = 1.0f / (1.0f + std::exp(-values[e]));
    return;
  }
  float top = values[0];
  for (std::int64_t e = 1; e < router.experts; ++e) top = std::fmax(top, values[e]);
  float total = 0;
  for (std::int64_t e = 0; e < router.experts; ++e) total += values[e] = std::exp(values[e] - top);
  for (std::int64_t e = 0; e < router.experts; ++e) values[e] /= total;
}

// Index of the largest value not yet taken, the lowest index among equals, and marks it taken. There must be one.
inline std::int64_t take_largest(const float* values, bool* taken, std::int64_t count) {
  std::int64_t best = -1;
  for (std::int64_t i = 0; i < count; ++i) {
    if (!taken[i] && (best < 0 || values[i] > values[best])) best = i;
  }
  taken[best] = true;
  return best;
}

// Sum of the best one or two values.
inline float sum_of_best(const float* values, std::int64_t count, std::int64_t best) {
  float first = -__builtin_inff(), second = first;
  for (std::int64_t i = 0; i < count; ++i) {
    if (values[i] > first) {
      second = first;
      first = values[i];
    } else if (values[i] > second) {
      second = values[i];
    }
  }
  return best < 2 || count < 2 ? first : first + second;
}

// Scratch floats that choose() needs.
inline std::int64_t choose_scratch(const Router& router) { return 2 * router.experts + 2 * router.groups; }

// Top-k experts and their weights for one token, from its scores.
inline void choose(const Router& router, const float* scores, float* scratch, std::int32_t* experts, float* weights) {
  float* choice = scratch;
  float* group_scores = choice + router.experts;
  bool* taken = reinterpret_cast<bool*>(group_scores + router.groups);
  bool* kept = taken + router.experts;
  const std::int64_t size = router.experts / router.groups;
  std::memset(taken, 0, router.experts + router.groups);
  for (std::int64_t e = 0; e < router.experts; ++e) {
    choice[e] = router.bias == nullptr ? scores[e] : scores[e] + router.bias[e];
  }
  if (router.groups > 1) {
    for (std::int64_t g = 0; g < router.groups; ++g) {
      group_scores[g] = sum_of_best(choice + g * size, size, router.best_in_group);
    }
    for (std::int64_t i = 0; i < router.kept_groups; ++i) take_largest(group_scores, kept, router.groups);
    for (std::int64_t e = 0; e < router.experts; ++e) {
      if (!kept[e / size]) choice[e] = -__builtin_inff();
    }
  }
  float total = 0;
  for (std::int64_t i = 0; i < router.chosen; ++i) {
    const std::int64_t expert = take_largest(choice, taken, router.experts);
    experts[i] = static_cast<std::int32_t>(expert);
    weights[i] = scores[expert];
    total += weights[i];
  }
  for (std::int64_t i = 0; i < router.chosen; ++i) {
    if (router.normalizes) weights[i] /= total + 1e-20f;
    weights[i] *= router.scaling;
  }
}

}  // namespace lowlat::LOWLAT_ISA
