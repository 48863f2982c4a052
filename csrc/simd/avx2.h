// SIMD types for AVX2 with FMA and F16C: 16 fp32 lanes as two 8-lane registers.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace lowlat::avx2::simd {

using bf16 = std::uint16_t;
using fp16 = std::uint16_t;

struct F { __m256 lo, hi; };   // 16 x fp32
struct P { __m256i lo, hi; };  // 16 pairs of bf16

inline F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline F add(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline F sub(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline F mul(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline F div(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline F max(F a, F b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline F min(F a, F b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
inline float sum(F a) {
  const __m256 eight = _mm256_add_ps(a.lo, a.hi);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float largest(F a) {
  const __m256 eight = _mm256_max_ps(a.lo, a.hi);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline F round_even(F a) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kMode), _mm256_round_ps(a.hi, kMode)};
}
// a * 2^n for integral n in [-252, 252]; in two factors, because 2^n may be subnormal
inline F scale2(F a, F n) {
  const auto power = [](__m256i k) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(k, _mm256_set1_epi32(127)), 23));
  };
  const auto scale = [&](__m256 x, __m256 m) {
    const __m256i whole = _mm256_cvtps_epi32(m), half = _mm256_srai_epi32(whole, 1);
    return _mm256_mul_ps(_mm256_mul_ps(x, power(half)), power(_mm256_sub_epi32(whole, half)));
  };
  return {scale(a.lo, n.lo), scale(a.hi, n.hi)};
}
// 0 where x < limit, else a (NaN included)
inline F zero_below(F a, F x, F limit) {
  return {_mm256_and_ps(a.lo, _mm256_cmp_ps(x.lo, limit.lo, _CMP_NLT_UQ)),
          _mm256_and_ps(a.hi, _mm256_cmp_ps(x.hi, limit.hi, _CMP_NLT_UQ))};
}
// a where first <= x < last, else other
inline F within(F a, F x, F first, F last, F other) {
  const auto pick = [](__m256 v, __m256 at, __m256 from, __m256 to, __m256 rest) {
    const __m256 inside = _mm256_and_ps(_mm256_cmp_ps(at, from, _CMP_GE_OQ), _mm256_cmp_ps(at, to, _CMP_LT_OQ));
    return _mm256_blendv_ps(rest, v, inside);
  };
  return {pick(a.lo, x.lo, first.lo, last.lo, other.lo), pick(a.hi, x.hi, first.hi, last.hi, other.hi)};
}

// Bit i is set where lane i of a is at least that of limit; NaN is not.
inline std::uint32_t lanes_at_least(F a, F limit) {
  const auto half = [](__m256 x, __m256 least) {
    return static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x, least, _CMP_GE_OQ)));
  };
  return half(a.lo, limit.lo) | half(a.hi, limit.hi) << 8;
}

inline __m128i load_half(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
// The bits of bf16(x) in the high half of each lane: round to nearest even, NaN stays a quiet NaN.
inline __m256i rounded_bits(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
}
// 16 x bf16 of 16 lanes, in order
inline __m256i to_bf16(F a) {
  const __m256i lo = _mm256_srli_epi32(rounded_bits(a.lo), 16), hi = _mm256_srli_epi32(rounded_bits(a.hi), 16);
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(lo, hi), 0xd8);
}

inline F load_bf16(const bf16* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half(p)), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half(p + 8)), 16))};
}
inline void store_bf16(bf16* p, F a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(a)); }
inline F load_fp16(const fp16* p) { return {_mm256_cvtph_ps(load_half(p)), _mm256_cvtph_ps(load_half(p + 8))}; }

inline P pairs(const void* p) {
  const auto* vector = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(vector), _mm256_loadu_si256(vector + 1)};
}
inline void store_pairs(void* p, P a) {
  auto* vector = static_cast<__m256i*>(p);
  _mm256_storeu_si256(vector, a.lo);
  _mm256_storeu_si256(vector + 1, a.hi);
}
inline P set1_pair(std::uint32_t pair) {
  const __m256i all = _mm256_set1_epi32(static_cast<int>(pair));
  return {all, all};
}
// acc + low(a) * low(b) + high(a) * high(b), lane by lane
inline F dot(F acc, P a, P b) {
  const auto low = [](__m256i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); };
  const auto high = [](__m256i x) {
    return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
  };
  const __m256 lo = _mm256_fmadd_ps(low(a.lo), low(b.lo), acc.lo), hi = _mm256_fmadd_ps(low(a.hi), low(b.hi), acc.hi);
  return {_mm256_fmadd_ps(high(a.lo), high(b.lo), lo), _mm256_fmadd_ps(high(a.hi), high(b.hi), hi)};
}

// Pairs (a[i], b[i]) of the first and of the last 16 of 32 elements.
inline void interleave(P a, P b, P& first, P& last) {
  const auto mix = [](__m256i x, __m256i y) -> P {
    const __m256i low = _mm256_unpacklo_epi16(x, y), high = _mm256_unpackhi_epi16(x, y);
    return {_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31)};
  };
  first = mix(a.lo, b.lo);
  last = mix(a.hi, b.hi);
}

inline __m256 widen_int8(const std::int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline F load_int8(const std::int8_t* p) { return {widen_int8(p), widen_int8(p + 8)}; }
// Integral values of at most 127 in magnitude.
inline void store_int8(std::int8_t* p, F a) {
  const __m256i both = _mm256_packs_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi));
  const __m256i words = _mm256_permute4x64_epi64(both, 0xd8);
  const __m128i all = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), all);
}

// Sums of two products of int8 and int16 each, of 32: lane i is that of elements 2 i and 2 i + 1.
inline F dot_integers(const std::int8_t* a, const std::int16_t* b) {
  const auto products = [](const std::int8_t* p, const std::int16_t* q) {
    const __m256i bytes = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(bytes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q))));
  };
  return {products(a, b), products(a + 16, b + 16)};
}
// acc + the sum of four products of bytes of `offset`, stored with 128 added, and of `with_sign`, from -127 to 127, in
// the 32 bits of every lane. Two such products fit 16 bits.
constexpr int kDotExcess = 0;
inline P dot_offset_bytes(P acc, P offset, P with_sign) {
  const auto added = [](__m256i sum, __m256i x, __m256i y) {
    const __m256i number = _mm256_xor_si256(x, _mm256_set1_epi8(static_cast<char>(0x80)));
    const __m256i twos = _mm256_maddubs_epi16(_mm256_abs_epi8(number), _mm256_sign_epi8(y, number));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(twos, _mm256_set1_epi16(1)));
  };
  return {added(acc.lo, offset.lo, with_sign.lo), added(acc.hi, offset.hi, with_sign.hi)};
}
inline P add_integers(P a, P b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
inline F integers_to_float(P a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }

// `first` in the first 8 lanes, `last` in the others.
inline F set1_halves(float first, float last) { return {_mm256_set1_ps(first), _mm256_set1_ps(last)}; }

// 32 values as bf16, exactly.
inline P pairs_of_int8(const std::int8_t* p) { return {to_bf16(load_int8(p)), to_bf16(load_int8(p + 16))}; }
// bf16(value * scale) of 32 values.
inline P pairs_of_int8(const std::int8_t* p, float scale) {
  return {to_bf16(mul(load_int8(p), set1(scale))), to_bf16(mul(load_int8(p + 16), set1(scale)))};
}
// bf16(value * scale) of 32 values of fp8-e4m3.
inline P pairs_of_fp8(const std::uint8_t* p, float scale) {
  const auto widen = [scale](const std::uint8_t* q) {
    const __m256i raw = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(q)));
    const __m256i magnitude = _mm256_and_si256(raw, _mm256_set1_epi32(0x7f));
    const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(raw, _mm256_set1_epi32(0x80)), 24);
    // The exponent is biased by 7 here and by 127 in fp32: a factor of 2^120.
    const __m256 tiny = _mm256_castsi256_ps(_mm256_or_si256(sign, _mm256_slli_epi32(magnitude, 20)));
    const __m256 value = _mm256_mul_ps(_mm256_mul_ps(tiny, _mm256_set1_ps(0x1p120f)), _mm256_set1_ps(scale));
    const __m256i nan = _mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7f));
    return _mm256_or_ps(value, _mm256_castsi256_ps(nan));
  };
  return {to_bf16({widen(p), widen(p + 8)}), to_bf16({widen(p + 16), widen(p + 24)})};
}
// The same without a scale, exactly.
inline P pairs_of_fp8(const std::uint8_t* p) { return pairs_of_fp8(p, 1.0f); }

// 32 values rounded to bf16, in their order.
inline P pairs_in_order(F first, F last) { return {to_bf16(first), to_bf16(last)}; }
// Pairs (even[i], odd[i]) rounded to bf16.
inline P pairs_of(F even, F odd) {
  const __m256i low = to_bf16(even), high = to_bf16(odd);
  const auto merged = [](__m128i a, __m128i b) {
    return _mm256_or_si256(_mm256_cvtepu16_epi32(a), _mm256_slli_epi32(_mm256_cvtepu16_epi32(b), 16));
  };
  return {merged(_mm256_castsi256_si128(low), _mm256_castsi256_si128(high)),
          merged(_mm256_extracti128_si256(low, 1), _mm256_extracti128_si256(high, 1))};
}

// The integer in some bits of every 32-bit lane.
template <int shift, int mask>
inline F field(P a) {
  const auto numbers = [](__m256i x) {
    return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(x, shift), _mm256_set1_epi32(mask)));
  };
  return {numbers(a.lo), numbers(a.hi)};
}

// 128 + the 4-bit number at `shift` of every 16-bit lane, in bf16: its mantissa holds the number.
template <int shift>
inline P small_integers(P a) {
  const auto numbers = [](__m256i x) {
    const __m256i number = _mm256_and_si256(_mm256_srli_epi16(x, shift), _mm256_set1_epi16(15));
    return _mm256_or_si256(number, _mm256_set1_epi16(0x4300));
  };
  return {numbers(a.lo), numbers(a.hi)};
}

// Transposes 8 x 8 words.
inline void transpose8(__m256i (&r)[8]) {
  __m256i t[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    r[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm256_permute2x128_si256(r[j], r[4 + j], 0x20);
    t[4 + j] = _mm256_permute2x128_si256(r[j], r[4 + j], 0x31);
  }
  for (int j = 0; j < 8; ++j) r[j] = t[j];
}
// Lane r of out[j] is pair j of row r. May work in place.
inline void transpose(const P (&rows)[16], P (&out)[16]) {
  __m256i top_left[8], top_right[8], bottom_left[8], bottom_right[8];
  for (int i = 0; i < 8; ++i) {
    top_left[i] = rows[i].lo;
    top_right[i] = rows[i].hi;
    bottom_left[i] = rows[8 + i].lo;
    bottom_right[i] = rows[8 + i].hi;
  }
  transpose8(top_left);
  transpose8(top_right);
  transpose8(bottom_left);
  transpose8(bottom_right);
  for (int j = 0; j < 8; ++j) {
    out[j] = {top_left[j], bottom_left[j]};
    out[8 + j] = {top_right[j], bottom_right[j]};
  }
}

// The sums of the lanes of 16 rows, lane i always added to lane i + 8, then i + 4, i + 2 and i + 1, in three steps.
// Two rows to 8 lanes each: [a | b].
inline F fold(F a, F b) { return {_mm256_add_ps(a.lo, a.hi), _mm256_add_ps(b.lo, b.hi)}; }
// Four rows to 4 lanes each: [a | b], [c | d] to [a | b | c | d].
inline F fold_again(F ab, F cd) {
  const auto fold_two = [](F x) {
    return _mm256_add_ps(_mm256_permute2f128_ps(x.lo, x.hi, 0x20), _mm256_permute2f128_ps(x.lo, x.hi, 0x31));
  };
  return {fold_two(ab), fold_two(cd)};
}
// Four times four rows of 4 lanes to the 16 sums, in their order.
inline F fold_fully(const F (&fours)[4]) {
  const auto halve = [](__m256 a, __m256 b) {
    return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
  };
  const auto fold_four = [&](__m256 a, __m256 b, __m256 c, __m256 d) {
    const __m256 even = halve(a, b), odd = halve(c, d);
    return _mm256_add_ps(_mm256_shuffle_ps(even, odd, 0x88), _mm256_shuffle_ps(even, odd, 0xdd));
  };
  const __m256 lo = fold_four(fours[0].lo, fours[1].lo, fours[2].lo, fours[3].lo);
  const __m256 hi = fold_four(fours[0].hi, fours[1].hi, fours[2].hi, fours[3].hi);
  // Row 4 g + l is element g of the four of l.
  __m128 l0 = _mm256_castps256_ps128(lo), l1 = _mm256_extractf128_ps(lo, 1);
  __m128 l2 = _mm256_castps256_ps128(hi), l3 = _mm256_extractf128_ps(hi, 1);
  _MM_TRANSPOSE4_PS(l0, l1, l2, l3);
  return {_mm256_set_m128(l1, l0), _mm256_set_m128(l3, l2)};
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
// Prefetches into the second-level cache only, for later use.
inline void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace lowlat::avx2::simd
