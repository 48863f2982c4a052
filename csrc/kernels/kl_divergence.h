// KL divergence loss for distillation: forward KL of a student's next-token distribution from a teacher's and its
// gradient, one row of logits at a time while the row is in cache. fp32 inside, rounded once.
#pragma once

#include "training.h"

namespace lowlat::LOWLAT_ISA::training {

// Logits minus their row's maximum, and the exponentials, of student (q) and teacher (p).
struct Shares {
  F below_q, below_p, q, p;
};

template <class T, class Left>
inline Shares shares_at(const T* logits, const T* teacher, Left left, F top_q, F top_p) {
  Shares s;
  s.below_q = sub(get(logits, left), top_q);
  s.below_p = sub(get(teacher, left), top_p);
  s.q = exp_of_negative(s.below_q);
  s.p = exp_of_negative(s.below_p);
  if (left < 16) {
    const F end = set1(static_cast<float>(left));
    s.below_q = within(s.below_q, lane_numbers(), zero(), end, zero());
    s.below_p = within(s.below_p, lane_numbers(), zero(), end, zero());
    s.q = within(s.q, lane_numbers(), zero(), end, zero());
    s.p = within(s.p, lane_numbers(), zero(), end, zero());
  }
  return s;
}

// With weights a = e^(q - top) of sum A and b = e^(p - top) of sum B,
// kl = sum b ((p - top) - (q - top)) / B - log B + log A, and its gradient by q is a / A - b / B.
template <class T>
void divergence_row(const DivergencePass& p, std::int64_t r) {
  T* logits = row<T>(p.logits, r, p.size);
  const T* teacher = row<T>(p.teacher, r, p.size);
  if (!p.counted[r]) {
    if (p.wants_gradient) std::memset(logits, 0, p.size * sizeof(T));
    p.kl[r] = p.nll[r] = 0;
    return;
  }
  const std::int64_t target = p.targets[r];
  const float highest_q = largest_of(logits, p.size), highest_p = largest_of(teacher, p.size);
  const float below_q = one(logits[target]) - highest_q, below_p = one(teacher[target]) - highest_p;
  const F top_q = set1(highest_q), top_p = set1(highest_p);
  F total_q = zero(), total_p = zero(), surplus = zero();
  for_lanes(p.size, [&](std::int64_t i, auto left) {
    const Shares s = shares_at(logits + i, teacher + i, left, top_q, top_p);
    total_q = add(total_q, s.q);
    total_p = add(total_p, s.p);
    surplus = fma(s.p, sub(s.below_p, s.below_q), surplus);
  });
  const float sum_q = sum(total_q), sum_p = sum(total_p);
  p.kl[r] = sum(surplus) / sum_p - std::log(sum_p) + std::log(sum_q);
  p.nll[r] = std::log(sum_q) - below_q;
  if (!p.wants_gradient) return;
  const float by_q = (1.0f + p.nll_weight) / sum_q, by_p = 1.0f / sum_p;
  for_lanes(p.size, [&](std::int64_t i, auto left) {
    const Shares s = shares_at(logits + i, teacher + i, left, top_q, top_p);
    put(logits + i, sub(mul(s.q, set1(by_q)), mul(s.p, set1(by_p))), left);
  });
  if (p.nll_weight != 0) {
    set(logits[target], scalar_exp(below_q) * by_q - p.nll_weight - scalar_exp(below_p) * by_p);
  }
}

template <class T>
void divergence(Team& team, const DivergencePass& p) {
  team.for_chunks(p.rows, 4, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t r = first; r < last; ++r) divergence_row<T>(p, r);
  });
}

inline void divergence(Team& t, const DivergencePass& p) {
  p.logits.is_bf16 ? divergence<bf16>(t, p) : divergence<float>(t, p);
}

}  // namespace lowlat::LOWLAT_ISA::training
