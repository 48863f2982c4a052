// Weight quantization to int8 (symmetric) and int4 (asymmetric) groups, group size 32, round to nearest: native
// kernel of quantize_int8 and quantize_int4 in lowlat/ops/quantized.py, bit for bit.
#pragma once

#include <cstring>

#include "../matrix.h"
#include "common.h"

namespace lowlat::LOWLAT_ISA {

// fp32 to fp16, round to nearest even; overflow becomes infinity.
inline fp16 to_fp16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const auto sign = static_cast<fp16>(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return static_cast<fp16>(sign | 0x7e00);  // NaN
  if (bits >= 0x477ff000) return static_cast<fp16>(sign | 0x7c00);  // rounds to 65536 or more
  if (bits >= 0x38800000) {                                        // normal in fp16
    const std::uint32_t odd = bits >> 13 & 1;
    return static_cast<fp16>(sign | ((bits - 0x38000000 + 0xfff + odd) >> 13));
  }
  // Subnormal: let an fp32 addition round at 2^-24.
  float magnitude, anchor = 0.5f;
  std::memcpy(&magnitude, &bits, sizeof bits);
  magnitude += anchor;
  std::memcpy(&bits, &magnitude, sizeof bits);
  return static_cast<fp16>(sign | (bits - 0x3f000000));
}

inline float from_fp16(fp16 x) {
  alignas(64) fp16 lanes[16] = {x};
  alignas(64) float wide[16];
  store(wide, load_fp16(lanes));
  return wide[0];
}

// 32 columns of a row; the last group of a row may have fewer.
struct GroupOfWeights {
  F low, high;
  float smallest, largest;
};

inline GroupOfWeights read_group(const void* row, bool is_bf16, std::int64_t first, std::int64_t count) {
  alignas(64) float edge[kGroup] = {};
  const auto* wide = static_cast<const float*>(row) + first;
  const auto* narrow = static_cast<const bf16*>(row) + first;
  for (std::int64_t i = 0; i < count; i += 16) {
    store(edge + i, is_bf16 ? load_bf16(narrow + i, count - i) : load(wide + i, count - i));
  }
  GroupOfWeights g{load(edge), load(edge + 16), edge[0], edge[0]};
  if (count == kGroup && sum(add(mul(g.low, zero()), mul(g.high, zero()))) == 0.0f) {  // all finite
    g.largest = largest(max(g.low, g.high));
    g.smallest = -largest(max(sub(zero(), g.low), sub(zero(), g.high)));
    return g;
  }
  for (std::int64_t i = 0; i < count; ++i) {
    // NaN propagates: it compares as neither smaller nor larger.
    g.smallest = edge[i] < g.smallest || edge[i] != edge[i] ? edge[i] : g.smallest;
    g.largest = edge[i] > g.largest || edge[i] != edge[i] ? edge[i] : g.largest;
  }
  return g;
}

inline F clamped(F x, float low, float high) { return max(min(x, set1(high)), set1(low)); }

// Quantizes one group of one row of a tile; `data` is the start of the group.
inline void pack_int8_group(const GroupOfWeights& g, std::int64_t row, std::uint8_t* data, fp16* scale) {
  *scale = to_fp16((g.largest > -g.smallest ? g.largest : -g.smallest) / 127.0f);
  const float wide = from_fp16(*scale);
  const F divisor = set1(wide == 0.0f ? 1.0f : wide);
  alignas(64) std::int8_t q[kGroup];
  store_int8(q, clamped(round_even(div(g.low, divisor)), -127, 127));
  store_int8(q + 16, clamped(round_even(div(g.high, divisor)), -127, 127));
  for (int step = 0; step < 8; ++step) {
    const std::uint32_t x = word_at(q + 4 * step) ^ 0x80808080;  // + 128
    const std::uint32_t even_first = (x & 0xff0000ff) | (x >> 8 & 0xff00) | (x << 8 & 0xff0000);
    std::memcpy(data + 64 * step + 4 * row, &even_first, 4);
  }
}

inline void pack_int4_group(const GroupOfWeights& g, std::int64_t count, std::int64_t row, std::uint8_t* data,
                            fp16* scale, fp16* minimum) {
  *scale = to_fp16((g.largest - g.smallest) / 15.0f);
  *minimum = to_fp16(g.smallest);
  const float wide = from_fp16(*scale);
  const F divisor = set1(wide == 0.0f ? 1.0f : wide), least_value = set1(from_fp16(*minimum));
  alignas(64) std::int8_t q[kGroup];
  store_int8(q, clamped(round_even(div(sub(g.low, least_value), divisor)), 0, 15));
  store_int8(q + 16, clamped(round_even(div(sub(g.high, least_value), divisor)), 0, 15));
  std::memset(q + count, 0, kGroup - count);
  for (int step = 0; step < 4; ++step) {
    // The third and fourth column of four go into the high nibbles of the first two.
    const std::uint32_t first = word_at(q + 8 * step), second = word_at(q + 8 * step + 4);
    const std::uint32_t a = first | first >> 12, b = second | second >> 12;
    const std::uint32_t even_first = (a & 0xff) | (b & 0xff) << 8 | (a & 0xff00) << 8 | (b & 0xff00) << 16;
    std::memcpy(data + 64 * step + 4 * row, &even_first, 4);
  }
}

// Quantizes one tile of `to` from rows of fp32 or bf16, `stride` elements apart.
inline void pack_tile(const void* weights, bool is_bf16, std::int64_t stride, const Matrix& to, std::int64_t tile) {
  const std::int64_t groups = to.groups(), bytes = to.group_bytes();
  auto* data = static_cast<std::uint8_t*>(const_cast<void*>(to.data)) + tile * groups * bytes;
  auto* scale = static_cast<fp16*>(const_cast<void*>(to.scale)) + tile * groups * kTile;
  auto* minimum = static_cast<fp16*>(const_cast<void*>(to.minimum)) + tile * groups * kTile;
  const char* base = static_cast<const char*>(weights);
  for (std::int64_t r = 0; r < kTile; ++r) {
    const std::int64_t row = tile * kTile + r;
    const char* from = base + row * stride * (is_bf16 ? 2 : 4);
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::int64_t first = g * kGroup, count = row < to.rows ? least(kGroup, to.columns - first) : 0;
      const GroupOfWeights group = count > 0 ? read_group(from, is_bf16, first, count) : GroupOfWeights{zero(), zero(), 0, 0};
      if (to.storage == Storage::int8) {
        pack_int8_group(group, r, data + g * bytes, scale + g * kTile + r);
      } else {
        pack_int4_group(group, count, r, data + g * bytes, scale + g * kTile + r, minimum + g * kTile + r);
      }
    }
  }
}

}  // namespace lowlat::LOWLAT_ISA
