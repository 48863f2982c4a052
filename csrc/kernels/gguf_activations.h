// Activations as 15-bit integers for GEMV with GGUF blocks, in spans of 256 columns.
//
// Each 32 activations share a scale, the largest of them over 16256, as for int8 and int4 (split_activations.h): the
// error is a sixtieth of bf16's rounding. Integer sums are exact.
#pragma once

#include <cmath>
#include <vector>

#include "panels.h"

namespace lowlat::LOWLAT_ISA::gguf {

// 256 activations: integers, and per 16 of them the scale and the sum. On AVX-512 an integer is 128 high + low, and the
// scale and sum of group 4 k + j are at 4 j + k, where gguf_gemv.h leaves the group's products.
struct SpanActivations {
#if defined(LOWLAT_AVX512)
  alignas(64) std::int8_t high[kSpan];
  alignas(64) std::int8_t low[kSpan];
#else
  alignas(64) std::int16_t value[kSpan];
#endif
  alignas(64) float scale[kScales];
  alignas(64) float sum[kScales];
};

inline int place_of_group(int group) {
#if defined(LOWLAT_AVX512)
  return group % 4 * 4 + group / 4;
#else
  return group;
#endif
}

// 16 integers from activations, and their sum.
inline std::int32_t put_integers(F x, float scale, SpanActivations& to, int group) {
  constexpr float kMost = 127 * 128;
  const F integers = round_even(max(set1(-kMost), min(set1(kMost), div(x, set1(scale)))));
#if defined(LOWLAT_AVX512)
  const __m512i q = _mm512_cvtps_epi32(integers.v);
  const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(64)), 7);
  const __m512i low = _mm512_sub_epi32(q, _mm512_slli_epi32(high, 7));
  _mm_store_si128(reinterpret_cast<__m128i*>(to.high + 16 * group), _mm512_cvtepi32_epi8(high));
  _mm_store_si128(reinterpret_cast<__m128i*>(to.low + 16 * group), _mm512_cvtepi32_epi8(low));
  return _mm512_reduce_add_epi32(q);
#else
  alignas(64) float lanes[16];
  store(lanes, integers);
  std::int32_t total = 0;
  for (int i = 0; i < 16; ++i) {
    const auto q = static_cast<std::int16_t>(lanes[i]);
    to.value[16 * group + i] = q;
    total += q;
  }
  return total;
#endif
}

// 32 activations. With infinity or NaN they become zeros with a NaN scale, which every product propagates.
inline void split_pair(const bf16* x, SpanActivations& to, int group) {
  const F first = load_bf16(x), last = load_bf16(x + 16);
  const F magnitude = max(max(first, sub(zero(), first)), max(last, sub(zero(), last)));
  const float top = sum(mul(add(first, last), zero())) + largest(magnitude);
  float scale = top / (127 * 128);
  const bool is_usable = scale > 0.0f && std::isfinite(scale);
  if (!is_usable && scale != 0.0f) scale = std::nanf("");
  const float divisor = is_usable ? scale : 1.0f;
  for (int half = 0; half < 2; ++half) {
    const std::int32_t total = put_integers(!is_usable ? zero() : half == 0 ? first : last, divisor, to, group + half);
    const int place = place_of_group(group + half);
    to.scale[place] = scale;
    to.sum[place] = scale * static_cast<float>(total);
  }
}

inline std::int64_t num_spans(std::int64_t columns) { return (columns + kSpan - 1) / kSpan; }

// A thread's split activations: computed once for all strips it multiplies in a phase.
class ActivationStore {
 public:
  void forget() {
    known_.clear();
    used_ = 0;
  }

  // Spans of all rows of x: [rows, num_spans(columns)]. Valid until the next call.
  const SpanActivations* find(const Activations& x, std::int64_t columns) {
    for (const Known& k : known_) {
      if (k.values == x.values && k.rows == x.rows && k.columns == columns) return spans_.data() + k.first;
    }
    const std::int64_t first = used_, count = num_spans(columns);
    used_ += x.rows * count;
    if (used_ > static_cast<std::int64_t>(spans_.size())) spans_.resize(2 * used_);
    for (std::int64_t r = 0; r < x.rows; ++r) {
      for (std::int64_t s = 0; s < count; ++s) {
        SpanActivations& to = spans_[first + r * count + s];
        const std::int64_t here = least(kSpan, round_up(columns - s * kSpan, kGroup));
        if (here < kSpan) to = {};
        const bf16* from = x.values + r * x.stride + s * kSpan;
        for (std::int64_t c = 0; c < here; c += kGroup) split_pair(from + c, to, static_cast<int>(c / 16));
      }
    }
    known_.push_back({x.values, x.rows, columns, first});
    return spans_.data() + first;
  }

 private:
  struct Known {
    const bf16* values;
    std::int64_t rows, columns, first;
  };

  std::vector<Known> known_;
  std::vector<SpanActivations> spans_;
  std::int64_t used_ = 0;
};

inline thread_local ActivationStore activation_store;

}  // namespace lowlat::LOWLAT_ISA::gguf
