// SIMD types in plain C++: 16 lanes are an array, and the compiler vectorizes loops over them. Little-endian machines
// only.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace lowlat::portable::simd {

static_assert(std::endian::native == std::endian::little, "weights are stored little-endian");

using bf16 = std::uint16_t;
using fp16 = std::uint16_t;

constexpr int kLanes = 16;

struct alignas(64) F { float v[kLanes]; };
struct alignas(64) P { std::uint32_t v[kLanes]; };  // pairs of bf16, the first in the low half

// Calls body(lane) for every lane and gathers the results.
template <class Vector, class Body>
inline Vector lanes(Body&& body) {
  Vector out;
  for (int i = 0; i < kLanes; ++i) out.v[i] = body(i);
  return out;
}

inline F set1(float x) {
  return lanes<F>([&](int) { return x; });
}
inline F zero() { return set1(0.0f); }
inline F load(const float* p) {
  F out;
  std::memcpy(out.v, p, sizeof out.v);
  return out;
}
inline void store(float* p, F a) { std::memcpy(p, a.v, sizeof a.v); }
inline F add(F a, F b) {
  return lanes<F>([&](int i) { return a.v[i] + b.v[i]; });
}
inline F sub(F a, F b) {
  return lanes<F>([&](int i) { return a.v[i] - b.v[i]; });
}
inline F mul(F a, F b) {
  return lanes<F>([&](int i) { return a.v[i] * b.v[i]; });
}
inline F div(F a, F b) {
  return lanes<F>([&](int i) { return a.v[i] / b.v[i]; });
}
// If one of two numbers is NaN, the second, as on x86.
inline F max(F a, F b) {
  return lanes<F>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F min(F a, F b) {
  return lanes<F>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
// Fused only if the machine has the instruction: a C library call per lane would cost more than it gains.
inline float fma(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
inline F fma(F a, F b, F c) {
  return lanes<F>([&](int i) { return fma(a.v[i], b.v[i], c.v[i]); });
}
inline float sum(F a) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) a.v[i] += a.v[i + width];
  }
  return a.v[0];
}
inline float largest(F a) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) a.v[i] = a.v[i] > a.v[i + width] ? a.v[i] : a.v[i + width];
  }
  return a.v[0];
}
// Adding and subtracting 1.5 * 2^23 leaves no bits for a fraction; numbers of 2^22 and more are unchanged.
inline F round_even(F a) {
  constexpr float kShift = 0x1.8p23f;
  return lanes<F>([&](int i) {
    const float x = a.v[i];
    return x > -0x1p22f && x < 0x1p22f ? (x + kShift) - kShift : x;
  });
}
// a * 2^n for integral n in [-252, 252]; in two factors, because 2^n may be subnormal
inline F scale2(F a, F n) {
  const auto power = [](std::int32_t k) { return std::bit_cast<float>((k + 127) << 23); };
  return lanes<F>([&](int i) {
    const float x = n.v[i];
    const std::int32_t whole = x >= -252.0f && x <= 252.0f ? static_cast<std::int32_t>(x) : 0, half = whole >> 1;
    return a.v[i] * power(half) * power(whole - half);
  });
}
// 0 where x < limit, else a (NaN included)
inline F zero_below(F a, F x, F limit) {
  return lanes<F>([&](int i) { return x.v[i] < limit.v[i] ? 0.0f : a.v[i]; });
}
// a where first <= x < last, else other
inline F within(F a, F x, F first, F last, F other) {
  return lanes<F>([&](int i) { return x.v[i] >= first.v[i] && x.v[i] < last.v[i] ? a.v[i] : other.v[i]; });
}

// Bit i is set where lane i of a is at least that of limit; NaN is not.
inline std::uint32_t lanes_at_least(F a, F limit) {
  std::uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= static_cast<std::uint32_t>(a.v[i] >= limit.v[i]) << i;
  return mask;
}

inline float low_half(std::uint32_t pair) { return std::bit_cast<float>(pair << 16); }
inline float high_half(std::uint32_t pair) { return std::bit_cast<float>(pair & 0xffff0000u); }
// The bits of bf16(x): round to nearest even, NaN stays a quiet NaN.
inline bf16 rounded(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<bf16>(x != x ? 0x7fc0u : nearest);
}
inline F load_bf16(const bf16* p) {
  return lanes<F>([&](int i) { return low_half(p[i]); });
}
inline void store_bf16(bf16* p, F a) {
  for (int i = 0; i < kLanes; ++i) p[i] = rounded(a.v[i]);
}
// The exponent is biased by 15 in fp16 and by 127 in fp32: a factor of 2^112. Infinities and NaN keep theirs full.
inline F load_fp16(const fp16* p) {
  return lanes<F>([&](int i) {
    const std::uint32_t magnitude = p[i] & 0x7fffu, sign = (p[i] & 0x8000u) << 16;
    const std::uint32_t number = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude << 13) * 0x1p112f);
    return std::bit_cast<float>(sign | (magnitude >= 0x7c00u ? 0x7f800000u | magnitude << 13 : number));
  });
}

inline P pairs(const void* p) {
  P out;
  std::memcpy(out.v, p, sizeof out.v);
  return out;
}
inline void store_pairs(void* p, P a) { std::memcpy(p, a.v, sizeof a.v); }
inline P set1_pair(std::uint32_t pair) {
  return lanes<P>([&](int) { return pair; });
}
// acc + low(a) * low(b) + high(a) * high(b), lane by lane
inline F dot(F acc, P a, P b) {
  return lanes<F>([&](int i) {
    const float low = fma(low_half(a.v[i]), low_half(b.v[i]), acc.v[i]);
    return fma(high_half(a.v[i]), high_half(b.v[i]), low);
  });
}

// Pairs (a[i], b[i]) of the first and of the last 16 of 32 elements.
inline void interleave(P a, P b, P& first, P& last) {
  bf16 x[2 * kLanes], y[2 * kLanes];
  std::memcpy(x, a.v, sizeof x);
  std::memcpy(y, b.v, sizeof y);
  const auto pair = [&](int i) { return x[i] | static_cast<std::uint32_t>(y[i]) << 16; };
  first = lanes<P>(pair);
  last = lanes<P>([&](int i) { return pair(i + kLanes); });
}

inline F load_int8(const std::int8_t* p) {
  return lanes<F>([&](int i) { return static_cast<float>(p[i]); });
}
// Integral values of at most 127 in magnitude.
inline void store_int8(std::int8_t* p, F a) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<std::int8_t>(a.v[i]);
}

// Sums of two products of int8 and int16 each, of 32: lane i is that of elements 2 i and 2 i + 1.
inline F dot_integers(const std::int8_t* a, const std::int16_t* b) {
  return lanes<F>([&](int i) { return static_cast<float>(a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1]); });
}
// acc + the sum of four products of bytes of `offset`, stored with 128 added, and of `with_sign`, in the 32 bits of every
// lane.
constexpr int kDotExcess = 0;
inline P dot_offset_bytes(P acc, P offset, P with_sign) {
  const auto byte = [](std::uint32_t word, int shift) { return static_cast<std::int8_t>(word >> shift); };
  return lanes<P>([&](int i) {
    const std::uint32_t x = offset.v[i] ^ 0x80808080u, y = with_sign.v[i];
    const std::int32_t sum = byte(x, 0) * byte(y, 0) + byte(x, 8) * byte(y, 8) + byte(x, 16) * byte(y, 16) +
                             byte(x, 24) * byte(y, 24);
    return acc.v[i] + static_cast<std::uint32_t>(sum);
  });
}
inline P add_integers(P a, P b) {
  return lanes<P>([&](int i) { return a.v[i] + b.v[i]; });
}
inline F integers_to_float(P a) {
  return lanes<F>([&](int i) { return static_cast<float>(static_cast<std::int32_t>(a.v[i])); });
}

// `first` in the first 8 lanes, `last` in the others.
inline F set1_halves(float first, float last) {
  return lanes<F>([&](int i) { return i < 8 ? first : last; });
}

// 32 values as bf16, exactly.
inline P pairs_of_int8(const std::int8_t* p) {
  return lanes<P>([&](int i) {
    return rounded(p[2 * i]) | static_cast<std::uint32_t>(rounded(p[2 * i + 1])) << 16;
  });
}
// bf16(value * scale) of 32 values.
inline P pairs_of_int8(const std::int8_t* p, float scale) {
  return lanes<P>([&](int i) {
    return rounded(p[2 * i] * scale) | static_cast<std::uint32_t>(rounded(p[2 * i + 1] * scale)) << 16;
  });
}
// bf16(value * scale) of 32 values of fp8-e4m3.
inline P pairs_of_fp8(const std::uint8_t* p, float scale) {
  const auto number = [&](std::uint32_t raw) -> std::uint32_t {
    const std::uint32_t magnitude = raw & 0x7f, sign = (raw & 0x80) << 24;
    // The exponent is biased by 7 here and by 127 in fp32: a factor of 2^120.
    const float value = std::bit_cast<float>(sign | magnitude << 20) * 0x1p120f * scale;
    return magnitude == 0x7f ? 0x7fc0u : rounded(value);
  };
  return lanes<P>([&](int i) { return number(p[2 * i]) | number(p[2 * i + 1]) << 16; });
}
// The same without a scale, exactly.
inline P pairs_of_fp8(const std::uint8_t* p) { return pairs_of_fp8(p, 1.0f); }

// 32 values rounded to bf16, in their order.
inline P pairs_in_order(F first, F last) {
  return lanes<P>([&](int i) {
    const float* values = i < 8 ? first.v + 2 * i : last.v + 2 * i - 16;
    return rounded(values[0]) | static_cast<std::uint32_t>(rounded(values[1])) << 16;
  });
}
// Pairs (even[i], odd[i]) rounded to bf16.
inline P pairs_of(F even, F odd) {
  return lanes<P>([&](int i) { return rounded(even.v[i]) | static_cast<std::uint32_t>(rounded(odd.v[i])) << 16; });
}

// The integer in some bits of every 32-bit lane.
template <int shift, int mask>
inline F field(P a) {
  return lanes<F>([&](int i) { return static_cast<float>(a.v[i] >> shift & mask); });
}

// 128 + the 4-bit number at `shift` of every 16-bit lane, in bf16: its mantissa holds the number.
template <int shift>
inline P small_integers(P a) {
  return lanes<P>([&](int i) { return (a.v[i] >> shift & 0x000f000f) | 0x43004300; });
}

// Lane r of out[j] is pair j of row r. May work in place.
inline void transpose(const P (&rows)[16], P (&out)[16]) {
  std::uint32_t word[kLanes][kLanes];
  for (int r = 0; r < kLanes; ++r) std::memcpy(word[r], rows[r].v, sizeof word[r]);
  for (int j = 0; j < kLanes; ++j) {
    for (int r = 0; r < kLanes; ++r) out[j].v[r] = word[r][j];
  }
}

// The sums of the lanes of 16 rows, lane i always added to lane i + 8, then i + 4, i + 2 and i + 1, in three steps.
// Two rows to 8 lanes each: [a | b].
inline F fold(F a, F b) {
  return lanes<F>([&](int i) { return i < 8 ? a.v[i] + a.v[i + 8] : b.v[i - 8] + b.v[i]; });
}
// Four rows to 4 lanes each: [a | b], [c | d] to [a | b | c | d].
inline F fold_again(F ab, F cd) {
  return lanes<F>([&](int i) {
    const float* row = (i < 8 ? ab.v : cd.v) + i / 4 % 2 * 8 + i % 4;
    return row[0] + row[4];
  });
}
// Four times four rows of 4 lanes to the 16 sums, in their order.
inline F fold_fully(const F (&fours)[4]) {
  return lanes<F>([&](int i) {
    const float* row = fours[i / 4].v + i % 4 * 4;
    return (row[0] + row[2]) + (row[1] + row[3]);
  });
}

inline void prefetch(const void* p) { __builtin_prefetch(p); }
// Prefetches into the second-level cache only, for later use.
inline void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace lowlat::portable::simd
