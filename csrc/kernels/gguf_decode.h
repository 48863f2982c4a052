// Decoders of GGUF's quantized blocks: small integers, with a scale and a minimum per 16 columns.
//
//   weight = scale * value - minimum
//
// In every type the product is exact in fp32, so one rounding gives the bits of the gguf package's dequantize().
// Layouts: ggml-common.h and ggml-quants.c of llama.cpp, gguf/quants.py.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>

#include "../gguf_codebooks.h"
#include "../gguf_types.h"
#include "common.h"

namespace lowlat::LOWLAT_ISA::gguf {

constexpr std::int64_t kSpan = 256;  // columns that are decoded at once: one block, or several small ones
constexpr int kScales = 16;          // of a span

inline float half_at(const std::uint8_t* p) {
  fp16 bits;
  std::memcpy(&bits, p, sizeof bits);
  const std::uint32_t magnitude = bits & 0x7fffu, sign = (bits & 0x8000u) << 16;
  const auto number = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude << 13) * 0x1p112f);
  return std::bit_cast<float>(sign | (magnitude >= 0x7c00u ? 0x7f800000u | magnitude << 13 : number));
}

inline std::uint32_t short_at(const std::uint8_t* p) {
  std::uint16_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

// Where a block is decoded to: scales and minima are those of 16 columns each. Types without minima leave them alone.
struct Target {
  std::int8_t* value;
  float *scale, *minimum;

  void set_scales(int groups, float all) const {
    for (int g = 0; g < groups; ++g) scale[g] = all;
  }
  void set_minima(int groups, float all) const {
    for (int g = 0; g < groups; ++g) minimum[g] = all;
  }
};

template <GgufType type>
struct Decoder;

// --- blocks of 32 columns ---------------------------------------------------------------------------------------------

// 16 bytes: columns 0 to 15 are the low halves, 16 to 31 the high ones.
inline void split_halves(const std::uint8_t* bytes, int offset, std::int8_t* value) {
  for (int i = 0; i < 16; ++i) {
    value[i] = static_cast<std::int8_t>((bytes[i] & 15) - offset);
    value[16 + i] = static_cast<std::int8_t>((bytes[i] >> 4) - offset);
  }
}

// The same with a fifth bit per column from `high`.
inline void split_fives(const std::uint8_t* bytes, const std::uint8_t* high, int offset, std::int8_t* value) {
  const std::uint32_t bits = word_at(high);
  for (int i = 0; i < 16; ++i) {
    value[i] = static_cast<std::int8_t>(((bytes[i] & 15) | (bits >> i & 1) << 4) - offset);
    value[16 + i] = static_cast<std::int8_t>((bytes[i] >> 4 | (bits >> (16 + i) & 1) << 4) - offset);
  }
}

template <>
struct Decoder<GgufType::Q4_0> {
  static constexpr bool kHasMinimum = false;
  static void decode(const std::uint8_t* b, const Target& to) {
    to.set_scales(2, half_at(b));
    split_halves(b + 2, 8, to.value);
  }
};

template <>
struct Decoder<GgufType::Q4_1> {
  static constexpr bool kHasMinimum = true;
  static void decode(const std::uint8_t* b, const Target& to) {
    to.set_scales(2, half_at(b));
    to.set_minima(2, -half_at(b + 2));
    split_halves(b + 4, 0, to.value);
  }
};

template <>
struct Decoder<GgufType::Q5_0> {
  static constexpr bool kHasMinimum = false;
  static void decode(const std::uint8_t* b, const Target& to) {
    to.set_scales(2, half_at(b));
    split_fives(b + 6, b + 2, 16, to.value);
  }
};

template <>
struct Decoder<GgufType::Q5_1> {
  static constexpr bool kHasMinimum = true;
  static void decode(const std::uint8_t* b, const Target& to) {
    to.set_scales(2, half_at(b));
    to.set_minima(2, -half_at(b + 2));
    split_fives(b + 8, b + 4, 0, to.value);
  }
};

template <>
struct Decoder<GgufType::Q8_0> {
  static constexpr bool kHasMinimum = false;
  static void decode(const std::uint8_t* b, const Target& to) {
    to.set_scales(2, half_at(b));
    std::memcpy(to.value, b + 2, 32);
  }
};

inline constexpr std::int8_t kIq4Levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
// Twice the values of fp4 e2m1.
inline constexpr std::int8_t kFp4Levels[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

inline void split_levels(const std::uint8_t* bytes, const std::int8_t (&levels)[16], int half, std::int8_t* value) {
  for (int i = 0; i < half; ++i) {
    value[i] = levels[bytes[i] & 15];
    value[half + i] = levels[bytes[i] >> 4];
  }
}

template <>
struct Decoder<GgufType::IQ4_NL> {
  static constexpr bool kHasMinimum = false;
  static void decode(const std::uint8_t* b, const Target& to) {
    to.set_scales(2, half_at(b));
    split_levels(b + 2, kIq4Levels, 16, to.value);
  }
};

// Half of the e8m0 number.
inline float half_of_e8m0(std::uint32_t e) { return std::bit_cast<float>(e < 2 ? 0x00200000u << e : (e - 1) << 23); }

template <>
struct Decoder<GgufType::MXFP4> {
  static constexpr bool kHasMinimum = false;
  static void decode(const std::uint8_t* b, const Target& to) {
    to.set_scales(2, half_of_e8m0(b[0]));
    split_levels(b + 1, kFp4Levels, 16, to.value);
  }
};

// Half of the number in e4m3 without a sign; 0x7f is 0, as in llama.cpp.
inline float half_of_e4m3(std::uint32_t x) {
  if (x == 0x7f) return 0.0f;
  const std::uint32_t exponent = x >> 3 & 15, mantissa = x & 7;
  if (exponent == 0) return static_cast<float>(mantissa) * 0x1p-10f;
  return std::bit_cast<float>((exponent + 127 - 7 - 1) << 23 | mantissa << 20);
}

// Four groups of 16 columns.
template <>
struct Decoder<GgufType::NVFP4> {
  static constexpr bool kHasMinimum = false;
  static void decode(const std::uint8_t* b, const Target& to) {
    for (int g = 0; g < 4; ++g) {
      to.scale[g] = half_of_e4m3(b[g]);
      split_levels(b + 4 + 8 * g, kFp4Levels, 8, to.value + 16 * g);
    }
  }
};

// --- int4 of safetensors files ------------------------------------------------------------------------------------------

// A bf16 scale; zero is 8.
template <>
struct Decoder<GgufType::INT4_BF16> {
  static constexpr bool kHasMinimum = false;
  static void decode(const std::uint8_t* b, const Target& to) {
    to.set_scales(2, std::bit_cast<float>(short_at(b) << 16));
    split_halves(b + 2, 8, to.value);
  }
};

// A word: an fp32 scale whose last 8 bits are 0, and instead of them the integer that stands for zero, 0 to 16.
template <int columns>
struct ZeroPointDecoder {
  static constexpr bool kHasMinimum = false;
  static void decode(const std::uint8_t* b, const Target& to) {
    const std::uint32_t word = word_at(b);
    to.set_scales(columns / 16, std::bit_cast<float>(word & 0xffffff00u));
    for (int c = 0; c < columns; c += 32) split_halves(b + 4 + c / 2, static_cast<int>(word & 255), to.value + c);
  }
};
template <>
struct Decoder<GgufType::INT4_32> : ZeroPointDecoder<32> {};
template <>
struct Decoder<GgufType::INT4_128> : ZeroPointDecoder<128> {};

// --- K types ----------------------------------------------------------------------------------------------------------

// Two bits per column: byte i of 32 holds columns i, 32 + i, 64 + i and 96 + i.
inline void split_quarters(const std::uint8_t* bytes, std::int8_t* value) {
  for (int part = 0; part < 2; ++part) {
    for (int shift = 0; shift < 4; ++shift) {
      std::int8_t* to = value + 128 * part + 32 * shift;
      for (int i = 0; i < 32; ++i) to[i] = static_cast<std::int8_t>(bytes[32 * part + i] >> 2 * shift & 3);
    }
  }
}

template <>
struct Decoder<GgufType::Q2_K> {
  static constexpr bool kHasMinimum = true;
  static void decode(const std::uint8_t* b, const Target& to) {
    const float d = half_at(b + 80), minimum = half_at(b + 82);
    for (int g = 0; g < 16; ++g) {
      to.scale[g] = d * static_cast<float>(b[g] & 15);
      to.minimum[g] = minimum * static_cast<float>(b[g] >> 4);
    }
    split_quarters(b + 16, to.value);
  }
};

template <>
struct Decoder<GgufType::Q3_K> {
  static constexpr bool kHasMinimum = false;
  static void decode(const std::uint8_t* b, const Target& to) {
    const std::uint8_t* s = b + 96;
    const float d = half_at(b + 108);
    for (int g = 0; g < 16; ++g) {
      const int low = g < 8 ? s[g] & 15 : s[g - 8] >> 4, high = s[8 + g % 4] >> 2 * (g / 4) & 3;
      to.scale[g] = d * static_cast<float>((low | high << 4) - 32);
    }
    split_quarters(b + 32, to.value);
    for (int bit = 0; bit < 8; ++bit) {
      std::int8_t* value = to.value + 32 * bit;
      for (int i = 0; i < 32; ++i) value[i] = static_cast<std::int8_t>(value[i] + ((b[i] >> bit & 1) << 2) - 4);
    }
  }
};

// Scales and minima of 6 bits in 12 bytes, each for 32 columns.
inline void decode_k_scales(const std::uint8_t* b, const Target& to) {
  const float d = half_at(b), minimum = half_at(b + 2);
  const std::uint8_t* s = b + 4;
  for (int j = 0; j < 4; ++j) {
    const int scales[2] = {s[j] & 63, (s[8 + j] & 15) | (s[j] >> 2 & 48)};
    const int minima[2] = {s[4 + j] & 63, s[8 + j] >> 4 | (s[4 + j] >> 2 & 48)};
    for (int half = 0; half < 2; ++half) {
      const int g = 2 * (4 * half + j);
      to.scale[g] = to.scale[g + 1] = d * static_cast<float>(scales[half]);
      to.minimum[g] = to.minimum[g + 1] = minimum * static_cast<float>(minima[half]);
    }
  }
}

template <>
struct Decoder<GgufType::Q4_K> {
  static constexpr bool kHasMinimum = true;
  static void decode(const std::uint8_t* b, const Target& to) {
    decode_k_scales(b, to);
    for (int part = 0; part < 4; ++part) {
      const std::uint8_t* bytes = b + 16 + 32 * part;
      std::int8_t* value = to.value + 64 * part;
      for (int i = 0; i < 32; ++i) {
        value[i] = static_cast<std::int8_t>(bytes[i] & 15);
        value[32 + i] = static_cast<std::int8_t>(bytes[i] >> 4);
      }
    }
  }
};

template <>
struct Decoder<GgufType::Q5_K> {
  static constexpr bool kHasMinimum = true;
  static void decode(const std::uint8_t* b, const Target& to) {
    decode_k_scales(b, to);
    const std::uint8_t* high = b + 16;
    for (int part = 0; part < 4; ++part) {
      const std::uint8_t* bytes = b + 48 + 32 * part;
      std::int8_t* value = to.value + 64 * part;
      for (int i = 0; i < 32; ++i) {
        value[i] = static_cast<std::int8_t>((bytes[i] & 15) | (high[i] >> 2 * part & 1) << 4);
        value[32 + i] = static_cast<std::int8_t>(bytes[i] >> 4 | (high[i] >> (2 * part + 1) & 1) << 4);
      }
    }
  }
};

template <>
struct Decoder<GgufType::Q6_K> {
  static constexpr bool kHasMinimum = false;
  static void decode(const std::uint8_t* b, const Target& to) {
    const float d = half_at(b + 208);
    for (int g = 0; g < 16; ++g) to.scale[g] = d * static_cast<float>(static_cast<std::int8_t>(b[192 + g]));
    for (int part = 0; part < 4; ++part) {
      // 64 columns: half of two consecutive runs of 32, two bits each of the same 32 bytes
      const std::uint8_t *low = b + 64 * (part / 2), *high = b + 128 + 32 * (part / 2);
      const int nibble = 4 * (part % 2);
      for (int run = 0; run < 2; ++run) {
        std::int8_t* value = to.value + 64 * part + 32 * run;
        const int shift = 2 * (2 * (part % 2) + run);
        for (int i = 0; i < 32; ++i) {
          const int four = low[32 * run + i] >> nibble & 15, two = high[i] >> shift & 3;
          value[i] = static_cast<std::int8_t>((four | two << 4) - 32);
        }
      }
    }
  }
};

// --- ternary types ----------------------------------------------------------------------------------------------------

// Bytes of 5 (or 4) base-3 digits: digit j of byte i is column count * j + i.
inline void split_threes(const std::uint8_t* bytes, int count, int digits, std::int8_t* value) {
  std::uint8_t power = 1;
  for (int digit = 0; digit < digits; ++digit, power = static_cast<std::uint8_t>(3 * power)) {
    for (int i = 0; i < count; ++i) {
      const auto shifted = static_cast<std::uint8_t>(bytes[i] * power);
      value[count * digit + i] = static_cast<std::int8_t>((3 * shifted >> 8) - 1);
    }
  }
}

template <>
struct Decoder<GgufType::TQ1_0> {
  static constexpr bool kHasMinimum = false;
  static void decode(const std::uint8_t* b, const Target& to) {
    to.set_scales(16, half_at(b + 52));
    split_threes(b, 32, 5, to.value);
    split_threes(b + 32, 16, 5, to.value + 160);
    split_threes(b + 48, 4, 4, to.value + 240);
  }
};

template <>
struct Decoder<GgufType::TQ2_0> {
  static constexpr bool kHasMinimum = false;
  static void decode(const std::uint8_t* b, const Target& to) {
    to.set_scales(16, half_at(b + 64));
    split_quarters(b, to.value);
    for (int i = 0; i < 256; ++i) to.value[i] = static_cast<std::int8_t>(to.value[i] - 1);
  }
};

}  // namespace lowlat::LOWLAT_ISA::gguf
