// SIMD types for 64-bit ARM NEON: 16 fp32 lanes as four 4-lane registers.
#pragma once

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>

namespace lowlat::neon::simd {

using bf16 = std::uint16_t;
using fp16 = std::uint16_t;

struct F { float32x4_t q[4]; };  // 16 x fp32
struct P { uint32x4_t q[4]; };   // 16 pairs of bf16

// Calls body(quarter) for every four lanes and gathers the results.
template <class Vector, class Body>
inline Vector quarters(Body&& body) {
  return {{body(0), body(1), body(2), body(3)}};
}

inline F set1(float x) {
  const float32x4_t all = vdupq_n_f32(x);
  return {{all, all, all, all}};
}
inline F zero() { return set1(0.0f); }
inline F load(const float* p) {
  return quarters<F>([&](int i) { return vld1q_f32(p + 4 * i); });
}
inline void store(float* p, F a) {
  vst1q_f32(p, a.q[0]);
  vst1q_f32(p + 4, a.q[1]);
  vst1q_f32(p + 8, a.q[2]);
  vst1q_f32(p + 12, a.q[3]);
}
inline F add(F a, F b) {
  return quarters<F>([&](int i) { return vaddq_f32(a.q[i], b.q[i]); });
}
inline F sub(F a, F b) {
  return quarters<F>([&](int i) { return vsubq_f32(a.q[i], b.q[i]); });
}
inline F mul(F a, F b) {
  return quarters<F>([&](int i) { return vmulq_f32(a.q[i], b.q[i]); });
}
inline F div(F a, F b) {
  return quarters<F>([&](int i) { return vdivq_f32(a.q[i], b.q[i]); });
}
// If one of two numbers is NaN, the second, as on x86.
inline float32x4_t larger(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline F max(F a, F b) {
  return quarters<F>([&](int i) { return larger(a.q[i], b.q[i]); });
}
inline F min(F a, F b) {
  return quarters<F>([&](int i) { return vbslq_f32(vcltq_f32(a.q[i], b.q[i]), a.q[i], b.q[i]); });
}
inline F fma(F a, F b, F c) {
  return quarters<F>([&](int i) { return vfmaq_f32(c.q[i], a.q[i], b.q[i]); });
}
inline float sum(F a) {
  const float32x4_t four = vaddq_f32(vaddq_f32(a.q[0], a.q[2]), vaddq_f32(a.q[1], a.q[3]));
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
inline float largest(F a) {
  const float32x4_t four = larger(larger(a.q[0], a.q[2]), larger(a.q[1], a.q[3]));
  const float32x4_t two = larger(four, vextq_f32(four, four, 2));
  const float first = vgetq_lane_f32(two, 0), second = vgetq_lane_f32(two, 1);
  return first > second ? first : second;
}
inline F round_even(F a) {
  return quarters<F>([&](int i) { return vrndnq_f32(a.q[i]); });
}
// a * 2^n for integral n in [-252, 252]; in two factors, because 2^n may be subnormal
inline F scale2(F a, F n) {
  const auto power = [](int32x4_t k) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(k, vdupq_n_s32(127)), 23));
  };
  return quarters<F>([&](int i) {
    const int32x4_t whole = vcvtnq_s32_f32(n.q[i]), half = vshrq_n_s32(whole, 1);
    return vmulq_f32(vmulq_f32(a.q[i], power(half)), power(vsubq_s32(whole, half)));
  });
}
// 0 where x < limit, else a (NaN included)
inline F zero_below(F a, F x, F limit) {
  return quarters<F>([&](int i) {
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(a.q[i]), vcltq_f32(x.q[i], limit.q[i])));
  });
}
// a where first <= x < last, else other
inline F within(F a, F x, F first, F last, F other) {
  return quarters<F>([&](int i) {
    const uint32x4_t inside = vandq_u32(vcgeq_f32(x.q[i], first.q[i]), vcltq_f32(x.q[i], last.q[i]));
    return vbslq_f32(inside, a.q[i], other.q[i]);
  });
}

// Bit i is set where lane i of a is at least that of limit; NaN is not.
inline std::uint32_t lanes_at_least(F a, F limit) {
  static constexpr std::uint32_t kBits[4] = {1, 2, 4, 8};
  const uint32x4_t bits = vld1q_u32(kBits);
  std::uint32_t mask = 0;
  for (int i = 0; i < 4; ++i) mask |= vaddvq_u32(vandq_u32(vcgeq_f32(a.q[i], limit.q[i]), bits)) << (4 * i);
  return mask;
}

// The bits of bf16(x) in the high half of each lane: round to nearest even, NaN stays a quiet NaN.
inline uint32x4_t rounded_bits(float32x4_t x) {
  const uint32x4_t bits = vreinterpretq_u32_f32(x);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  return vbslq_u32(vceqq_f32(x, x), rounded, vdupq_n_u32(0x7fc00000));
}
inline uint16x8_t to_bf16(float32x4_t first, float32x4_t last) {
  return vcombine_u16(vshrn_n_u32(rounded_bits(first), 16), vshrn_n_u32(rounded_bits(last), 16));
}
inline float32x4_t from_bf16(uint16x4_t x) { return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(x), 16)); }

inline F load_bf16(const bf16* p) {
  return quarters<F>([&](int i) { return from_bf16(vld1_u16(p + 4 * i)); });
}
inline void store_bf16(bf16* p, F a) {
  vst1q_u16(p, to_bf16(a.q[0], a.q[1]));
  vst1q_u16(p + 8, to_bf16(a.q[2], a.q[3]));
}
inline F load_fp16(const fp16* p) {
  return quarters<F>([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
}

inline P pairs(const void* p) {
  const auto* bytes = static_cast<const std::uint8_t*>(p);
  return quarters<P>([&](int i) { return vreinterpretq_u32_u8(vld1q_u8(bytes + 16 * i)); });
}
inline void store_pairs(void* p, P a) {
  auto* bytes = static_cast<std::uint8_t*>(p);
  vst1q_u8(bytes, vreinterpretq_u8_u32(a.q[0]));
  vst1q_u8(bytes + 16, vreinterpretq_u8_u32(a.q[1]));
  vst1q_u8(bytes + 32, vreinterpretq_u8_u32(a.q[2]));
  vst1q_u8(bytes + 48, vreinterpretq_u8_u32(a.q[3]));
}
inline P set1_pair(std::uint32_t pair) {
  const uint32x4_t all = vdupq_n_u32(pair);
  return {{all, all, all, all}};
}
// acc + low(a) * low(b) + high(a) * high(b), lane by lane
inline F dot(F acc, P a, P b) {
  const auto low = [](uint32x4_t x) { return vreinterpretq_f32_u32(vshlq_n_u32(x, 16)); };
  const auto high = [](uint32x4_t x) { return vreinterpretq_f32_u32(vandq_u32(x, vdupq_n_u32(0xffff0000))); };
  return quarters<F>([&](int i) {
    return vfmaq_f32(vfmaq_f32(acc.q[i], low(a.q[i]), low(b.q[i])), high(a.q[i]), high(b.q[i]));
  });
}

// Pairs (a[i], b[i]) of the first and of the last 16 of 32 elements.
inline void interleave(P a, P b, P& first, P& last) {
  const auto mixed = [&](int i) {  // quarter i of all 32 pairs' eight
    const uint16x8_t x = vreinterpretq_u16_u32(a.q[i / 2]), y = vreinterpretq_u16_u32(b.q[i / 2]);
    return vreinterpretq_u32_u16(i % 2 == 0 ? vzip1q_u16(x, y) : vzip2q_u16(x, y));
  };
  first = quarters<P>(mixed);
  last = quarters<P>([&](int i) { return mixed(i + 4); });
}

inline F load_int8(const std::int8_t* p) {
  const int8x16_t bytes = vld1q_s8(p);
  const int16x8_t first = vmovl_s8(vget_low_s8(bytes)), last = vmovl_s8(vget_high_s8(bytes));
  return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(first))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(first))),
           vcvtq_f32_s32(vmovl_s16(vget_low_s16(last))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(last)))}};
}
// Integral values of at most 127 in magnitude.
inline void store_int8(std::int8_t* p, F a) {
  const auto words = [&](int i) { return vqmovn_s32(vcvtnq_s32_f32(a.q[i])); };
  vst1_s8(p, vqmovn_s16(vcombine_s16(words(0), words(1))));
  vst1_s8(p + 8, vqmovn_s16(vcombine_s16(words(2), words(3))));
}

// Sums of two products of int8 and int16 each, of 32: lane i is that of elements 2 i and 2 i + 1.
inline F dot_integers(const std::int8_t* a, const std::int16_t* b) {
  return quarters<F>([&](int i) {
    const int16x8_t x = vmovl_s8(vld1_s8(a + 8 * i)), y = vld1q_s16(b + 8 * i);
    const int32x4_t low = vmull_s16(vget_low_s16(x), vget_low_s16(y));
    return vcvtq_f32_s32(vpaddq_s32(low, vmull_s16(vget_high_s16(x), vget_high_s16(y))));
  });
}
// acc + the sum of four products of bytes of `offset`, stored with 128 added, and of `with_sign`, in the 32 bits of every
// lane.
constexpr int kDotExcess = 0;
inline P dot_offset_bytes(P acc, P offset, P with_sign) {
  return quarters<P>([&](int i) {
    const int8x16_t x = vreinterpretq_s8_u8(veorq_u8(vreinterpretq_u8_u32(offset.q[i]), vdupq_n_u8(0x80)));
    const int8x16_t y = vreinterpretq_s8_u32(with_sign.q[i]);
    const int32x4_t first = vpaddlq_s16(vmull_s8(vget_low_s8(x), vget_low_s8(y)));
    const int32x4_t last = vpaddlq_s16(vmull_s8(vget_high_s8(x), vget_high_s8(y)));
    return vaddq_u32(acc.q[i], vreinterpretq_u32_s32(vpaddq_s32(first, last)));
  });
}
inline P add_integers(P a, P b) {
  return quarters<P>([&](int i) { return vaddq_u32(a.q[i], b.q[i]); });
}
inline F integers_to_float(P a) {
  return quarters<F>([&](int i) { return vcvtq_f32_s32(vreinterpretq_s32_u32(a.q[i])); });
}

// `first` in the first 8 lanes, `last` in the others.
inline F set1_halves(float first, float last) {
  const float32x4_t a = vdupq_n_f32(first), b = vdupq_n_f32(last);
  return {{a, a, b, b}};
}

// 32 values rounded to bf16, in their order.
inline P pairs_in_order(F first, F last) {
  const auto both = [](F x, int i) { return vreinterpretq_u32_u16(to_bf16(x.q[i], x.q[i + 1])); };
  return {{both(first, 0), both(first, 2), both(last, 0), both(last, 2)}};
}
// Pairs (even[i], odd[i]) rounded to bf16.
inline P pairs_of(F even, F odd) {
  return quarters<P>([&](int i) { return vsriq_n_u32(rounded_bits(odd.q[i]), rounded_bits(even.q[i]), 16); });
}

// 32 values as bf16, exactly.
inline P pairs_of_int8(const std::int8_t* p) { return pairs_in_order(load_int8(p), load_int8(p + 16)); }
// bf16(value * scale) of 32 values.
inline P pairs_of_int8(const std::int8_t* p, float scale) {
  return pairs_in_order(mul(load_int8(p), set1(scale)), mul(load_int8(p + 16), set1(scale)));
}
// bf16(value * scale) of 32 values of fp8-e4m3.
inline P pairs_of_fp8(const std::uint8_t* p, float scale) {
  const auto number = [scale](uint32x4_t raw) {
    const uint32x4_t magnitude = vandq_u32(raw, vdupq_n_u32(0x7f));
    const uint32x4_t sign = vshlq_n_u32(vandq_u32(raw, vdupq_n_u32(0x80)), 24);
    // The exponent is biased by 7 here and by 127 in fp32: a factor of 2^120.
    const float32x4_t tiny = vreinterpretq_f32_u32(vorrq_u32(sign, vshlq_n_u32(magnitude, 20)));
    const float32x4_t value = vmulq_n_f32(vmulq_n_f32(tiny, 0x1p120f), scale);
    const uint32x4_t nan = vceqq_u32(magnitude, vdupq_n_u32(0x7f));
    return vreinterpretq_f32_u32(vorrq_u32(vreinterpretq_u32_f32(value), nan));
  };
  const auto widened = [&](const std::uint8_t* q) -> F {
    const uint8x16_t bytes = vld1q_u8(q);
    const uint16x8_t first = vmovl_u8(vget_low_u8(bytes)), last = vmovl_u8(vget_high_u8(bytes));
    return {{number(vmovl_u16(vget_low_u16(first))), number(vmovl_u16(vget_high_u16(first))),
             number(vmovl_u16(vget_low_u16(last))), number(vmovl_u16(vget_high_u16(last)))}};
  };
  return pairs_in_order(widened(p), widened(p + 16));
}
// The same without a scale, exactly.
inline P pairs_of_fp8(const std::uint8_t* p) { return pairs_of_fp8(p, 1.0f); }

// The integer in some bits of every 32-bit lane.
template <int shift, int mask>
inline F field(P a) {
  return quarters<F>([&](int i) {
    const uint32x4_t shifted = vshlq_u32(a.q[i], vdupq_n_s32(-shift));
    return vcvtq_f32_u32(vandq_u32(shifted, vdupq_n_u32(mask)));
  });
}

// 128 + the 4-bit number at `shift` of every 16-bit lane, in bf16: its mantissa holds the number.
template <int shift>
inline P small_integers(P a) {
  return quarters<P>([&](int i) {
    const uint16x8_t shifted = vshlq_u16(vreinterpretq_u16_u32(a.q[i]), vdupq_n_s16(-shift));
    const uint16x8_t number = vandq_u16(shifted, vdupq_n_u16(15));
    return vreinterpretq_u32_u16(vorrq_u16(number, vdupq_n_u16(0x4300)));
  });
}

// Transposes 4 x 4 words.
inline void transpose4(uint32x4_t (&r)[4]) {
  const auto wide = [](uint32x4_t x) { return vreinterpretq_u64_u32(x); };
  const uint64x2_t a = wide(vzip1q_u32(r[0], r[1])), b = wide(vzip2q_u32(r[0], r[1]));
  const uint64x2_t c = wide(vzip1q_u32(r[2], r[3])), d = wide(vzip2q_u32(r[2], r[3]));
  r[0] = vreinterpretq_u32_u64(vzip1q_u64(a, c));
  r[1] = vreinterpretq_u32_u64(vzip2q_u64(a, c));
  r[2] = vreinterpretq_u32_u64(vzip1q_u64(b, d));
  r[3] = vreinterpretq_u32_u64(vzip2q_u64(b, d));
}
// Lane r of out[j] is pair j of row r. May work in place.
inline void transpose(const P (&rows)[16], P (&out)[16]) {
  P transposed[16];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      uint32x4_t block[4] = {rows[4 * r].q[c], rows[4 * r + 1].q[c], rows[4 * r + 2].q[c], rows[4 * r + 3].q[c]};
      transpose4(block);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) transposed[4 * c + j].q[r] = block[j];
    }
  }
  for (int j = 0; j < 16; ++j) out[j] = transposed[j];
}

// The sums of the lanes of 16 rows, lane i always added to lane i + 8, then i + 4, i + 2 and i + 1, in three steps.
// Two rows to 8 lanes each: [a | b].
inline F fold(F a, F b) {
  return {{vaddq_f32(a.q[0], a.q[2]), vaddq_f32(a.q[1], a.q[3]), vaddq_f32(b.q[0], b.q[2]),
           vaddq_f32(b.q[1], b.q[3])}};
}
// Four rows to 4 lanes each: [a | b], [c | d] to [a | b | c | d].
inline F fold_again(F ab, F cd) {
  return {{vaddq_f32(ab.q[0], ab.q[1]), vaddq_f32(ab.q[2], ab.q[3]), vaddq_f32(cd.q[0], cd.q[1]),
           vaddq_f32(cd.q[2], cd.q[3])}};
}
// Four times four rows of 4 lanes to the 16 sums, in their order.
inline F fold_fully(const F (&fours)[4]) {
  return quarters<F>([&](int i) {
    uint32x4_t lanes[4] = {vreinterpretq_u32_f32(fours[i].q[0]), vreinterpretq_u32_f32(fours[i].q[1]),
                           vreinterpretq_u32_f32(fours[i].q[2]), vreinterpretq_u32_f32(fours[i].q[3])};
    transpose4(lanes);
    const auto lane = [&](int j) { return vreinterpretq_f32_u32(lanes[j]); };
    return vaddq_f32(vaddq_f32(lane(0), lane(2)), vaddq_f32(lane(1), lane(3)));
  });
}

inline void prefetch(const void* p) { __builtin_prefetch(p); }
// Prefetches into the second-level cache only, for later use.
inline void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace lowlat::neon::simd
