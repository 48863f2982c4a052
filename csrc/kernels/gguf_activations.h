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
// scale and sum of group 4 k + j are at 4 j + k, where gguf_gemv.h leaves the group's products. Sums of the integers of
// 16 columns each are in their order, and so are sums of 32 columns each.
struct SpanActivations {
#if defined(LOWLAT_AVX512)
  alignas(64) std::int8_t high[kSpan];
  alignas(64) std::int8_t low[kSpan];
  alignas(64) std::int32_t total[kScales];
  std::int32_t wide_total[kScales / 2];
  float wide_sum[kScales / 2];
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
#if defined(LOWLAT_AVX512)
    to.total[group + half] = total;
#endif
  }
#if defined(LOWLAT_AVX512)
  to.wide_total[group / 2] = to.total[group] + to.total[group + 1];
  to.wide_sum[group / 2] = scale * static_cast<float>(to.wide_total[group / 2]);
#endif
}

inline std::int64_t num_spans(std::int64_t columns) { return (columns + kSpan - 1) / kSpan; }

// A span of row r of x.
inline void split_span(const Activations& x, std::int64_t r, std::int64_t first, std::int64_t columns, SpanActivations& to) {
  const std::int64_t here = least(kSpan, round_up(columns - first, kGroup));
  if (here < kSpan) to = {};
  const bf16* from = x.values + r * x.stride + first;
  for (std::int64_t c = 0; c < here; c += kGroup) split_pair(from + c, to, static_cast<int>(c / 16));
}

// A thread's split activations: computed once for all strips it multiplies in a phase.
template <class Span>
class ActivationStore {
 public:
  void forget() {
    known_.clear();
    used_ = 0;
  }

  // Spans of all rows of x: [rows, num_spans(columns)]. Valid until the next call. make(spans) computes them.
  template <class Make>
  const Span* find(const Activations& x, std::int64_t columns, Make&& make) {
    for (const Known& k : known_) {
      if (k.values == x.values && k.rows == x.rows && k.columns == columns) return spans_.data() + k.first;
    }
    const std::int64_t first = used_;
    used_ += x.rows * num_spans(columns);
    if (used_ > static_cast<std::int64_t>(spans_.size())) spans_.resize(2 * used_);
    make(spans_.data() + first);
    known_.push_back({x.values, x.rows, columns, first});
    return spans_.data() + first;
  }

 private:
  struct Known {
    const bf16* values;
    std::int64_t rows, columns, first;
  };

  std::vector<Known> known_;
  std::vector<Span> spans_;
  std::int64_t used_ = 0;
};

inline thread_local ActivationStore<SpanActivations> activation_store;

template <class Span>
inline const Span* find_activations(const Activations& x, std::int64_t columns);

template <>
inline const SpanActivations* find_activations(const Activations& x, std::int64_t columns) {
  return activation_store.find(x, columns, [&](SpanActivations* spans) {
    for (std::int64_t r = 0; r < x.rows; ++r) {
      for (std::int64_t first = 0; first < columns; first += kSpan) split_span(x, r, first, columns, *spans++);
    }
  });
}

#if defined(LOWLAT_AVX512)

// Spans whose 32 columns of a group are ordered 0, 8, 16, 24, 1, 9, ...: a word has a column of each codebook entry.
inline thread_local ActivationStore<SpanActivations> eights_store;

inline const SpanActivations* find_eights(const Activations& x, std::int64_t columns) {
  return eights_store.find(x, columns, [&](SpanActivations* spans) {
    alignas(64) std::uint8_t from[64];
    for (int i = 0; i < 64; ++i) from[i] = static_cast<std::uint8_t>(i / 32 * 32 + i % 4 * 8 + i % 32 / 4);
    const __m512i order = _mm512_load_si512(from);
    const SpanActivations* all = find_activations<SpanActivations>(x, columns);
    for (std::int64_t i = 0; i < x.rows * num_spans(columns); ++i) {
      spans[i] = all[i];
      for (int at = 0; at < kSpan; at += 64) {
        store_pairs(spans[i].high + at, {_mm512_permutexvar_epi8(order, pairs(all[i].high + at).v)});
        store_pairs(spans[i].low + at, {_mm512_permutexvar_epi8(order, pairs(all[i].low + at).v)});
      }
    }
  });
}

// 256 activations in the order of codebook entries (gguf_codes_iq.h): 64 bits e of 32 columns g are quarter-group
// 8 e + g. Lanes 2 g and 2 g + 1 belong to 32 columns: their scale, and the negative sums of the integers of the first
// and of the last 16 of them, each lane's own.
struct EntryActivations {
  alignas(64) std::int8_t high[kSpan];
  alignas(64) std::int8_t low[kSpan];
  alignas(64) std::int32_t start[2][16];
  alignas(64) float scale[16];

  void set(const SpanActivations& from) {
    for (int g = 0; g < 8; ++g) {
      for (int e = 0; e < 4; ++e) {
        std::memcpy(high + 64 * e + 8 * g, from.high + 32 * g + 8 * e, 8);
        std::memcpy(low + 64 * e + 8 * g, from.low + 32 * g + 8 * e, 8);
      }
      scale[2 * g] = scale[2 * g + 1] = from.scale[place_of_group(2 * g)];
    }
    const P one = {_mm512_set1_epi8(1)};
    for (int half = 0; half < 2; ++half) {
      P above = zero_pairs(), below = zero_pairs();
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        above = dot_bytes(above, one, pairs(high + 64 * e));
        below = dot_bytes(below, one, pairs(low + 64 * e));
      }
      const __m512i total = _mm512_add_epi32(_mm512_slli_epi32(above.v, 7), below.v);
      store_pairs(start[half], {_mm512_sub_epi32(_mm512_setzero_si512(), total)});
    }
  }
};

inline thread_local ActivationStore<EntryActivations> entry_store;

template <>
inline const EntryActivations* find_activations(const Activations& x, std::int64_t columns) {
  return entry_store.find(x, columns, [&](EntryActivations* spans) {
    const SpanActivations* from = find_activations<SpanActivations>(x, columns);
    for (std::int64_t i = 0; i < x.rows * num_spans(columns); ++i) spans[i].set(from[i]);
  });
}

#endif

// The activations may have changed.
inline void forget_activations() {
  activation_store.forget();
#if defined(LOWLAT_AVX512)
  entry_store.forget();
  eights_store.forget();
#endif
}

}  // namespace lowlat::LOWLAT_ISA::gguf
