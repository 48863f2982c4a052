// Decoders of GGUF's IQ types, whose integers come in vectors of 4 or 8 from a codebook.
#pragma once

#include <array>

#include "gguf_decode.h"

namespace lowlat::LOWLAT_ISA::gguf {

// Codebook entries as bytes in one word: `bits` of the packed entry index the type's levels.
template <class Word, int bits, std::size_t size, std::size_t count>
constexpr std::array<Word, size> unpacked(const std::uint16_t (&grid)[size], const int (&levels)[count]) {
  std::array<Word, size> result{};
  for (std::size_t entry = 0; entry < size; ++entry) {
    for (std::size_t i = 0; i < sizeof(Word); ++i) {
      const auto level = static_cast<std::uint8_t>(levels[grid[entry] >> bits * i & (count - 1)]);
      result[entry] |= static_cast<Word>(level) << 8 * i;
    }
  }
  return result;
}

inline constexpr int kIq2Levels[4] = {8, 25, 43, 0};
inline constexpr int kIq3XxsLevels[8] = {4, 12, 20, 28, 36, 44, 52, 62};
inline constexpr int kIq3SLevels[8] = {1, 3, 5, 7, 9, 11, 13, 15};
inline constexpr int kIq1Levels[4] = {-8, 0, 8, 0};  // in eighths

inline constexpr auto kIq2XxsWords = unpacked<std::uint64_t, 2>(kIq2XxsGrid, kIq2Levels);
inline constexpr auto kIq2XsWords = unpacked<std::uint64_t, 2>(kIq2XsGrid, kIq2Levels);
inline constexpr auto kIq2SWords = unpacked<std::uint64_t, 2>(kIq2SGrid, kIq2Levels);
inline constexpr auto kIq1Words = unpacked<std::uint64_t, 2>(kIq1Grid, kIq1Levels);
inline constexpr auto kIq3XxsWords = unpacked<std::uint32_t, 3>(kIq3XxsGrid, kIq3XxsLevels);
inline constexpr auto kIq3SWords = unpacked<std::uint32_t, 3>(kIq3SGrid, kIq3SLevels);

// The sign bits of 8 integers from 7: the number of negative ones is even.
inline std::uint32_t even_signs(std::uint32_t seven) {
  seven &= 127;
  return seven | (static_cast<std::uint32_t>(std::popcount(seven)) & 1) << 7;
}

// Eight integers, negative where a bit of `signs` is set.
inline void put_signed(std::uint64_t word, std::uint32_t signs, std::int8_t* value) {
  std::int8_t bytes[8];
  std::memcpy(bytes, &word, sizeof bytes);
  for (int i = 0; i < 8; ++i) value[i] = static_cast<std::int8_t>(signs >> i & 1 ? -bytes[i] : bytes[i]);
}

inline std::uint64_t joined(std::uint32_t first, std::uint32_t last) {
  return first | static_cast<std::uint64_t>(last) << 32;
}

template <>
struct Decoder<GgufType::IQ2_XXS> {
  static constexpr bool kHasMinimum = false;
  static void decode(const std::uint8_t* b, const Target& to) {
    const float d = half_at(b);
    for (int g = 0; g < 8; ++g) {
      const std::uint8_t* index = b + 2 + 8 * g;
      const std::uint32_t signs = word_at(index + 4);
      const float scale = d * (0.5f + static_cast<float>(signs >> 28)) * 0.25f;
      to.scale[2 * g] = to.scale[2 * g + 1] = scale;
      for (int i = 0; i < 4; ++i) {
        put_signed(kIq2XxsWords[index[i]], even_signs(signs >> 7 * i), to.value + 32 * g + 8 * i);
      }
    }
  }
};

// Scales of 4 bits, each for 16 columns.
inline void decode_nibble_scales(const std::uint8_t* nibbles, float d, const Target& to) {
  for (int g = 0; g < 16; ++g) {
    to.scale[g] = d * (0.5f + static_cast<float>(nibbles[g / 2] >> 4 * (g % 2) & 15)) * 0.25f;
  }
}

template <>
struct Decoder<GgufType::IQ2_XS> {
  static constexpr bool kHasMinimum = false;
  static void decode(const std::uint8_t* b, const Target& to) {
    decode_nibble_scales(b + 66, half_at(b), to);
    for (int i = 0; i < 32; ++i) {
      const std::uint32_t entry = short_at(b + 2 + 2 * i);
      put_signed(kIq2XsWords[entry & 511], even_signs(entry >> 9), to.value + 8 * i);
    }
  }
};

template <>
struct Decoder<GgufType::IQ2_S> {
  static constexpr bool kHasMinimum = false;
  static void decode(const std::uint8_t* b, const Target& to) {
    decode_nibble_scales(b + 74, half_at(b), to);
    for (int i = 0; i < 32; ++i) {
      const std::uint32_t entry = b[2 + i] | (b[66 + i / 4] >> 2 * (i % 4) & 3u) << 8;
      put_signed(kIq2SWords[entry], b[34 + i], to.value + 8 * i);
    }
  }
};

template <>
struct Decoder<GgufType::IQ3_XXS> {
  static constexpr bool kHasMinimum = false;
  static void decode(const std::uint8_t* b, const Target& to) {
    const float d = half_at(b);
    for (int g = 0; g < 8; ++g) {
      const std::uint8_t* index = b + 2 + 8 * g;
      const std::uint32_t signs = word_at(b + 66 + 4 * g);
      const float scale = d * (0.5f + static_cast<float>(signs >> 28)) * 0.5f;
      to.scale[2 * g] = to.scale[2 * g + 1] = scale;
      for (int i = 0; i < 4; ++i) {
        const std::uint64_t word = joined(kIq3XxsWords[index[2 * i]], kIq3XxsWords[index[2 * i + 1]]);
        put_signed(word, even_signs(signs >> 7 * i), to.value + 32 * g + 8 * i);
      }
    }
  }
};

template <>
struct Decoder<GgufType::IQ3_S> {
  static constexpr bool kHasMinimum = false;
  static void decode(const std::uint8_t* b, const Target& to) {
    const float d = half_at(b);
    const std::uint8_t *index = b + 2, *high = b + 66, *signs = b + 74, *scales = b + 106;
    for (int g = 0; g < 8; ++g) {
      const int nibble = scales[g / 2] >> 4 * (g % 2) & 15;
      to.scale[2 * g] = to.scale[2 * g + 1] = d * static_cast<float>(1 + 2 * nibble);
    }
    for (int i = 0; i < 32; ++i) {
      const auto entry = [&](int at) { return kIq3SWords[index[at] | (high[at / 8] >> at % 8 & 1u) << 8]; };
      put_signed(joined(entry(2 * i), entry(2 * i + 1)), signs[i], to.value + 8 * i);
    }
  }
};

// Eight integers of -1, 0 or 1, plus or minus an eighth; in eighths.
inline void put_shifted(std::uint32_t entry, bool is_down, std::int8_t* value) {
  std::int8_t bytes[8];
  std::memcpy(bytes, &kIq1Words[entry], sizeof bytes);
  for (int i = 0; i < 8; ++i) value[i] = static_cast<std::int8_t>(is_down ? bytes[i] - 1 : bytes[i] + 1);
}

template <>
struct Decoder<GgufType::IQ1_S> {
  static constexpr bool kHasMinimum = false;
  static void decode(const std::uint8_t* b, const Target& to) {
    const float d = half_at(b) * 0.125f;
    for (int g = 0; g < 8; ++g) {
      const std::uint32_t high = short_at(b + 34 + 2 * g);
      to.scale[2 * g] = to.scale[2 * g + 1] = d * static_cast<float>(2 * (high >> 12 & 7) + 1);
      for (int i = 0; i < 4; ++i) {
        put_shifted(b[2 + 4 * g + i] | (high >> 3 * i & 7) << 8, high >> 15 & 1, to.value + 32 * g + 8 * i);
      }
    }
  }
};

// The fp16 scale is the highest 4 bits of four words.
template <>
struct Decoder<GgufType::IQ1_M> {
  static constexpr bool kHasMinimum = false;
  static void decode(const std::uint8_t* b, const Target& to) {
    const std::uint8_t *high = b + 32, *scales = b + 48;
    std::uint16_t bits = 0;
    for (int i = 0; i < 4; ++i) bits = static_cast<std::uint16_t>(bits | (short_at(scales + 2 * i) >> 12) << 4 * i);
    std::uint8_t bytes[2];
    std::memcpy(bytes, &bits, sizeof bytes);
    const float d = half_at(bytes) * 0.125f;
    for (int g = 0; g < 16; ++g) {
      to.scale[g] = d * static_cast<float>(2 * (short_at(scales + 2 * (g / 4)) >> 3 * (g % 4) & 7) + 1);
      for (int i = 0; i < 2; ++i) {
        const std::uint32_t nibble = high[g] >> 4 * i & 15u;
        put_shifted(b[2 * g + i] | (nibble & 7) << 8, nibble >> 3 & 1, to.value + 16 * g + 8 * i);
      }
    }
  }
};

template <>
struct Decoder<GgufType::IQ4_XS> {
  static constexpr bool kHasMinimum = false;
  static void decode(const std::uint8_t* b, const Target& to) {
    const float d = half_at(b);
    const std::uint32_t high = short_at(b + 2);
    for (int g = 0; g < 8; ++g) {
      const int low = b[4 + g / 2] >> 4 * (g % 2) & 15, bits = low | (high >> 2 * g & 3) << 4;
      to.scale[2 * g] = to.scale[2 * g + 1] = d * static_cast<float>(bits - 32);
      split_levels(b + 8 + 16 * g, kIq4Levels, 16, to.value + 32 * g);
    }
  }
};

}  // namespace lowlat::LOWLAT_ISA::gguf
