// SIMD dispatch and math: includes the instruction set's vector types and adds exp, rounding and partial loads.
#pragma once

#if defined(LOWLAT_AMX)
#define LOWLAT_ISA amx  // AMX tile registers in addition to AVX-512
#define LOWLAT_AVX512
#include "../simd/avx512.h"
#elif defined(LOWLAT_AVX512)
#define LOWLAT_ISA avx512
#include "../simd/avx512.h"
#elif defined(LOWLAT_AVX2)
#define LOWLAT_ISA avx2
#include "../simd/avx2.h"
#elif defined(LOWLAT_NEON)
#define LOWLAT_ISA neon
#include "../simd/neon.h"
#else
#define LOWLAT_ISA portable
#include "../simd/portable.h"
#endif

#include <cstdint>
#include <cstring>

// Before a loop over an array of accumulators: only an early-unrolled loop keeps them in registers.
#define LOWLAT_UNROLL _Pragma("GCC unroll 16")

namespace lowlat::LOWLAT_ISA {

using namespace simd;

inline std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }
inline std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t most(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

inline std::uint32_t word_at(const void* p) {
  std::uint32_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

// e^x to about one unit in the last place; 0 below -87, finite up to 88. The coefficients are those of the Taylor
// series of e^r on |r| <= ln(2) / 2, where the remainder of degree 7 is below 2^-27.
inline F exp(F x) {
  // min and max return their second operand if one is NaN.
  const F clamped = max(set1(-104.0f), min(set1(88.0f), x));
  const F n = round_even(mul(clamped, set1(1.44269504f)));
  F r = fma(n, set1(-0.693359375f), clamped);
  r = fma(n, set1(2.12194440e-4f), r);
  F p = set1(1.0f / 5040);
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = fma(p, r, set1(c));
  return scale2(p, n);
}

// e^x, exactly 0 for x below -87.
inline F exp_or_zero(F x) { return zero_below(exp(x), x, set1(-87.0f)); }

// e^x for x <= 0 to 3e-6, exactly 0 below -87, -inf included; NaN propagates.
inline F exp_of_negative(F x) {
  const F n = round_even(mul(x, set1(1.44269504f)));
  const F r = fma(n, set1(-0.693147181f), x);
  F p = set1(1.0f / 120);
  for (const float c : {1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = fma(p, r, set1(c));
  return zero_below(scale2(p, n), x, set1(-87.0f));
}

// The same for a scalar, with the bits of a lane.
inline float scalar_exp(float x) {
  alignas(64) float lanes[16];
  store(lanes, exp_of_negative(set1(x)));
  return lanes[0];
}

inline F lane_numbers() {
  alignas(64) static constexpr float kLanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load(kLanes);
}

inline float bf16_to_float(bf16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline bf16 float_to_bf16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return 0x7fc0;
  return static_cast<bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Rounds to bf16.
inline F rounded(F a) {
  alignas(64) bf16 lanes[16];
  store_bf16(lanes, a);
  return load_bf16(lanes);
}

inline P zero_pairs() { return set1_pair(0); }

// Loads and stores of the last, partial vector of an array.
inline P load_pairs(const bf16* p, std::int64_t count) {
  if (count >= 32) return pairs(p);
  alignas(64) bf16 edge[32] = {};
  std::memcpy(edge, p, count * sizeof(bf16));
  return pairs(edge);
}
inline F load_bf16(const bf16* p, std::int64_t count) {
  if (count >= 16) return load_bf16(p);
  alignas(64) bf16 edge[16] = {};
  std::memcpy(edge, p, count * sizeof(bf16));
  return load_bf16(edge);
}
inline void store_bf16(bf16* p, F a, std::int64_t count) {
  if (count >= 16) return store_bf16(p, a);
  alignas(64) bf16 edge[16];
  store_bf16(edge, a);
  std::memcpy(p, edge, count * sizeof(bf16));
}
inline F load_int8(const std::int8_t* p, std::int64_t count) {
  if (count >= 16) return load_int8(p);
  alignas(64) std::int8_t edge[16] = {};
  std::memcpy(edge, p, count);
  return load_int8(edge);
}
inline void store_int8(std::int8_t* p, F a, std::int64_t count) {
  if (count >= 16) return store_int8(p, a);
  alignas(64) std::int8_t edge[16];
  store_int8(edge, a);
  std::memcpy(p, edge, count);
}
inline F load(const float* p, std::int64_t count) {
  if (count >= 16) return load(p);
  alignas(64) float edge[16] = {};
  std::memcpy(edge, p, count * sizeof(float));
  return load(edge);
}

}  // namespace lowlat::LOWLAT_ISA
