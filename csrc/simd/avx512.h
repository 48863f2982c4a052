// SIMD types for AVX-512 with BF16, VNNI and VBMI: 16 lanes of fp32 or int32 in one register.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace lowlat::LOWLAT_ISA::simd {

using bf16 = std::uint16_t;
using fp16 = std::uint16_t;

struct F { __m512 v; };    // 16 x fp32
struct P { __m512i v; };   // 16 pairs of bf16

inline F zero() { return {_mm512_setzero_ps()}; }
inline F set1(float x) { return {_mm512_set1_ps(x)}; }
inline F load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
inline F add(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F sub(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F mul(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F div(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline float sum(F a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(F a) { return _mm512_reduce_max_ps(a.v); }
inline F round_even(F a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a * 2^n for integral n
inline F scale2(F a, F n) { return {_mm512_scalef_ps(a.v, n.v)}; }

// 0 where x < limit, else a (NaN included)
inline F zero_below(F a, F x, F limit) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, limit.v, _CMP_NLT_UQ), a.v)};
}

// a where first <= x < last, else other
inline F within(F a, F x, F first, F last, F other) {
  const __mmask16 inside = _mm512_cmp_ps_mask(x.v, first.v, _CMP_GE_OQ) & _mm512_cmp_ps_mask(x.v, last.v, _CMP_LT_OQ);
  return {_mm512_mask_mov_ps(other.v, inside, a.v)};
}

// Bit i is set where lane i of a is at least that of limit; NaN is not.
inline std::uint32_t lanes_at_least(F a, F limit) { return _mm512_cmp_ps_mask(a.v, limit.v, _CMP_GE_OQ); }

inline F load_bf16(const bf16* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}
inline void store_bf16(bf16* p, F a) {
  // Not vcvtneps2bf16, which flushes subnormals: round to nearest even in integers, keep NaN quiet.
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i safe = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(safe, 16)));
}
inline F load_fp16(const fp16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

inline P pairs(const void* p) { return {_mm512_loadu_si512(p)}; }
// Keeps a value in its register: compilers would reload it for each of several products.
inline void keep(P& a) { asm("" : "+v"(a.v)); }
inline void store_pairs(void* p, P a) { _mm512_storeu_si512(p, a.v); }
inline P set1_pair(std::uint32_t pair) { return {_mm512_set1_epi32(static_cast<int>(pair))}; }
// acc + low(a) * low(b) + high(a) * high(b), lane by lane
inline F dot(F acc, P a, P b) {
  return {_mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}

// 64 bytes of int8 as value + 128.
inline P plus_128(P a) { return {_mm512_xor_si512(a.v, _mm512_set1_epi8(static_cast<char>(0x80)))}; }
// acc + the sum of four products of an unsigned and a signed byte, in the 32 bits of every lane.
inline P dot_bytes(P acc, P plain, P with_sign) { return {_mm512_dpbusd_epi32(acc.v, plain.v, with_sign.v)}; }
// The low and the high 4 bits of every byte.
inline P low_halves(P a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(0x0f))}; }
inline P high_halves(P a) { return low_halves({_mm512_srli_epi16(a.v, 4)}); }
// acc + the sum of four products of bytes of `offset`, stored with 128 added, and of `with_sign`. Lacks the correction
// for the 128: kDotExcess times the bytes of `with_sign`.
constexpr int kDotExcess = 128;
inline P dot_offset_bytes(P acc, P offset, P with_sign) { return dot_bytes(acc, offset, with_sign); }
inline P add_integers(P a, P b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline F integers_to_float(P a) { return {_mm512_cvtepi32_ps(a.v)}; }

inline P bits(F a) { return {_mm512_castps_si512(a.v)}; }
inline P both(P a, P b) { return {_mm512_and_si512(a.v, b.v)}; }
// All bits of the lanes that are zero.
inline P bits_where_zero(F a) {
  const __mmask16 is_zero = _mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_EQ_OQ);
  return {_mm512_maskz_mov_epi32(is_zero, _mm512_set1_epi32(-1))};
}
// The larger of two non-negative numbers; NaN if either is.
inline F max_bits(F a, F b) {
  return {_mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v)))};
}
inline float largest_bits(F a) {
  return _mm_cvtss_f32(_mm_castsi128_ps(
      _mm_cvtsi32_si128(static_cast<int>(_mm512_reduce_max_epu32(_mm512_castps_si512(a.v))))));
}
// Byte `number` (0 is the lowest) of the lanes of a, b, c and d, in memory order.
template <int number>
inline P gather_bytes(P a, P b, P c, P d) {
  const auto move = [](__m512i v, int to) {
    return to >= number ? _mm512_slli_epi32(v, 8 * (to - number)) : _mm512_srli_epi32(v, 8 * (number - to));
  };
  const auto choose = [](int mask, __m512i one, __m512i other) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi32(mask), one, other, 0xca);
  };
  const __m512i low = choose(0x000000ff, move(a.v, 0), move(b.v, 1));
  const __m512i high = choose(0x00ff0000, move(c.v, 2), move(d.v, 3));
  return {choose(0x0000ffff, low, high)};
}
// Rows of 64 bytes: words of a byte of each. Vector k holds bytes 16 l + 4 k to 16 l + 4 k + 3 in its quarter l.
inline void interleave_bytes(const P (&rows)[4], P (&out)[4]) {
  const __m512i ab = _mm512_unpacklo_epi8(rows[0].v, rows[1].v), cd = _mm512_unpacklo_epi8(rows[2].v, rows[3].v);
  const __m512i ef = _mm512_unpackhi_epi8(rows[0].v, rows[1].v), gh = _mm512_unpackhi_epi8(rows[2].v, rows[3].v);
  out[0] = {_mm512_unpacklo_epi16(ab, cd)};
  out[1] = {_mm512_unpackhi_epi16(ab, cd)};
  out[2] = {_mm512_unpacklo_epi16(ef, gh)};
  out[3] = {_mm512_unpackhi_epi16(ef, gh)};
}
// Quarter l of vector k goes to quarter k of vector l.
inline void transpose_quarters(P (&a)[4]) {
  const __m512i p = _mm512_shuffle_i32x4(a[0].v, a[1].v, 0x44), q = _mm512_shuffle_i32x4(a[2].v, a[3].v, 0x44);
  const __m512i r = _mm512_shuffle_i32x4(a[0].v, a[1].v, 0xee), s = _mm512_shuffle_i32x4(a[2].v, a[3].v, 0xee);
  a[0] = {_mm512_shuffle_i32x4(p, q, 0x88)};
  a[1] = {_mm512_shuffle_i32x4(p, q, 0xdd)};
  a[2] = {_mm512_shuffle_i32x4(r, s, 0x88)};
  a[3] = {_mm512_shuffle_i32x4(r, s, 0xdd)};
}

// Pairs (a[i], b[i]) of the first and of the last 16 of 32 elements.
inline void interleave(P a, P b, P& first, P& last) {
  alignas(64) static constexpr std::uint16_t kFirst[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                           8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i index = _mm512_load_si512(kFirst);
  first = {_mm512_permutex2var_epi16(a.v, index, b.v)};
  last = {_mm512_permutex2var_epi16(a.v, _mm512_add_epi16(index, _mm512_set1_epi16(16)), b.v)};
}

inline F load_int8(const std::int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
// Integral values of at most 127 in magnitude.
inline void store_int8(std::int8_t* p, F a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

// 32 values as bf16, exactly.
inline P pairs_of_int8(const std::int8_t* p) {
  return {reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(load_int8(p + 16).v, load_int8(p).v))};
}
// bf16(value * scale) of 32 values.
inline P pairs_of_int8(const std::int8_t* p, float scale) {
  const F low = mul(load_int8(p), set1(scale)), high = mul(load_int8(p + 16), set1(scale));
  return {reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v))};
}
// 32 values of fp8-e4m3 as bf16, exactly. In integers: arithmetic on subnormal numbers takes a hundred cycles.
inline P pairs_of_fp8(const std::uint8_t* p) {
  const auto all = [](int bits) { return _mm512_set1_epi16(static_cast<short>(bits)); };
  const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  const __m512i magnitude = _mm512_and_si512(bytes, all(0x7f));
  // The exponent is biased by 7 instead of 127. Subnormal numbers are the multiples 0 to 7 of 2^-9.
  __m512i value = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), all(120 << 7));
  const __m512i small = _mm512_broadcast_i32x4(_mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
  value = _mm512_mask_permutexvar_epi16(value, _mm512_cmplt_epi16_mask(magnitude, all(8)), magnitude, small);
  value = _mm512_mask_mov_epi16(value, _mm512_cmpeq_epi16_mask(magnitude, all(0x7f)), all(0x7fc0));
  return {_mm512_or_si512(value, _mm512_slli_epi16(_mm512_andnot_si512(all(0x7f), bytes), 8))};
}
// bf16(value * scale) of the same.
inline P pairs_of_fp8(const std::uint8_t* p, float scale) {
  const __m512i exact = pairs_of_fp8(p).v;
  const auto scaled = [&](__m256i half) {
    return _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)), _mm512_set1_ps(scale));
  };
  const __m512 low = scaled(_mm512_castsi512_si256(exact)), high = scaled(_mm512_extracti64x4_epi64(exact, 1));
  return {reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low))};
}

// 32 values rounded to bf16, in their order, for values that are not subnormal.
inline P pairs_in_order(F first, F last) {
  return {reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(last.v, first.v))};
}
// Pairs (even[i], odd[i]) rounded to bf16, for values that are neither subnormal nor NaN.
inline P pairs_of(F even, F odd) {
  alignas(64) static constexpr std::uint16_t kPairs[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd.v, even.v));
  return {_mm512_permutexvar_epi16(_mm512_load_si512(kPairs), both)};
}

// The integer in some bits of every 32-bit lane.
template <int shift, int mask>
inline F field(P a) {
  return {_mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(a.v, shift), _mm512_set1_epi32(mask)))};
}

// 128 + the 4-bit number at `shift` of every 16-bit lane, in bf16: its mantissa holds the number.
template <int shift>
inline P small_integers(P a) {
  const __m512i moved = shift == 0 ? a.v : _mm512_srli_epi16(a.v, shift);
  return {_mm512_ternarylogic_epi32(moved, _mm512_set1_epi16(0x000f), _mm512_set1_epi16(0x4300), 0xea)};
}

// Lane r of out[j] is pair j of row r. May work in place.
inline void transpose(const P (&rows)[16], P (&out)[16]) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = rows[i].v;
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // r[4i + j]: 128-bit lane l holds column 4l + j of rows 4i .. 4i + 3
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);        // lanes 0, 2 of both
    const __m512i b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);        // lanes 1, 3
    const __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    out[j] = {_mm512_shuffle_i32x4(a, c, 0x88)};
    out[8 + j] = {_mm512_shuffle_i32x4(a, c, 0xdd)};
    out[4 + j] = {_mm512_shuffle_i32x4(b, d, 0x88)};
    out[12 + j] = {_mm512_shuffle_i32x4(b, d, 0xdd)};
  }
}

// The sums of the lanes of 16 rows, lane i always added to lane i + 8, then i + 4, i + 2 and i + 1, in three steps.
// Two rows to 8 lanes each: [a | b].
inline F fold(F a, F b) {
  return {_mm512_add_ps(_mm512_shuffle_f32x4(a.v, b.v, 0x44), _mm512_shuffle_f32x4(a.v, b.v, 0xee))};
}
// Four rows to 4 lanes each: [a | b], [c | d] to [a | b | c | d].
inline F fold_again(F ab, F cd) {
  return {_mm512_add_ps(_mm512_shuffle_f32x4(ab.v, cd.v, 0x88), _mm512_shuffle_f32x4(ab.v, cd.v, 0xdd))};
}
// Four times four rows of 4 lanes to the 16 sums, in their order.
inline F fold_fully(const F (&fours)[4]) {
  const auto halve = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  };
  const __m512 even = halve(fours[0].v, fours[1].v), odd = halve(fours[2].v, fours[3].v);
  const __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(even, odd, 0x88), _mm512_shuffle_ps(even, odd, 0xdd));
  // Lane 4 l + g holds row 4 g + l.
  return {_mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), sums)};
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
// Prefetches into the second-level cache only, for later use.
inline void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace lowlat::LOWLAT_ISA::simd
