// AVX-512 decoders of interleaved GGUF blocks: 16 rows at once, a lane is a row.
#pragma once

#include "gguf_codes_iq.h"

namespace lowlat::LOWLAT_ISA::gguf {

// Decodes a block of 16 rows, group by group. weight = scale * (code - kZero) - minimum; word(i) holds the codes of four
// columns of the group.
template <GgufType type>
struct TileDecoder;

using Words = __m512i;

inline Words word_of(const std::uint8_t* block, int offset) { return pairs(block + 16 * offset).v; }
inline F halves_of(const std::uint8_t* block, int offset) {
  return load_fp16(reinterpret_cast<const fp16*>(block + 16 * offset));
}
inline Words shifted(Words words, int bits) { return _mm512_srlv_epi16(words, _mm512_set1_epi16(static_cast<short>(bits))); }
inline Words nibbles(Words words, int shift) { return _mm512_and_si512(shifted(words, shift), all_bytes(15)); }
// Byte `number` of every lane.
inline F byte_of(Words words, int number) {
  const Words lowest = _mm512_srlv_epi32(words, _mm512_set1_epi32(8 * number));
  return {_mm512_cvtepi32_ps(_mm512_and_si512(lowest, _mm512_set1_epi32(255)))};
}
// --- blocks of 32 columns ---------------------------------------------------------------------------------------------

// Four bits per column from `data`, fifth bits from `fifth` (0: none).
template <int data, int fifth, bool has_minimum>
struct NibbleTile {
  static constexpr int kGroup = 32, kGroups = 1;
  static constexpr bool kHasMinimum = has_minimum;

  const std::uint8_t* block;
  F scale, minimum = zero();

  explicit NibbleTile(const std::uint8_t* at) : block(at), scale(halves_of(at, 0)) {
    if constexpr (has_minimum) minimum = sub(zero(), halves_of(at, 2));
  }
  void start(int) {}
  Words word(int i) const {
    Words code = nibbles(word_of(block, data + 4 * (i % 4)), i < 4 ? 0 : 4);
    if constexpr (fifth > 0) {
      // Four bits of byte i / 2 of every lane, one for each byte of the word.
      const Words from = _mm512_add_epi8(_mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12)),
                                         all_bytes(i / 2));
      const Words own = _mm512_set1_epi32(static_cast<int>(i % 2 == 0 ? 0x08040201u : 0x80402010u));
      const __mmask64 set = _mm512_test_epi8_mask(_mm512_shuffle_epi8(word_of(block, fifth), from), own);
      code = _mm512_mask_add_epi8(code, set, code, all_bytes(16));
    }
    return code;
  }
};

template <>
struct TileDecoder<GgufType::Q4_0> : NibbleTile<2, 0, false> {
  static constexpr int kZero = 8;
  using NibbleTile::NibbleTile;
};
template <>
struct TileDecoder<GgufType::Q4_1> : NibbleTile<4, 0, true> {
  static constexpr int kZero = 0;
  using NibbleTile::NibbleTile;
};
template <>
struct TileDecoder<GgufType::Q5_0> : NibbleTile<6, 2, false> {
  static constexpr int kZero = 16;
  using NibbleTile::NibbleTile;
};
template <>
struct TileDecoder<GgufType::Q5_1> : NibbleTile<8, 4, true> {
  static constexpr int kZero = 0;
  using NibbleTile::NibbleTile;
};
template <>
struct TileDecoder<GgufType::IQ4_NL> : NibbleTile<2, 0, false> {
  static constexpr int kZero = 127;
  using NibbleTile::NibbleTile;
  Words word(int i) const { return _mm512_shuffle_epi8(level_codes(kIq4Levels, kZero), NibbleTile::word(i)); }
};

template <>
struct TileDecoder<GgufType::Q8_0> {
  static constexpr int kGroup = 32, kGroups = 1, kZero = 128;
  static constexpr bool kHasMinimum = false;
  const std::uint8_t* block;
  F scale, minimum = zero();
  explicit TileDecoder(const std::uint8_t* at) : block(at), scale(halves_of(at, 0)) {}
  void start(int) {}
  Words word(int i) const { return plus_128({word_of(block, 2 + 4 * i)}).v; }
};

template <>
struct TileDecoder<GgufType::MXFP4> {
  static constexpr int kGroup = 32, kGroups = 1, kZero = 12;
  static constexpr bool kHasMinimum = false;
  const std::uint8_t* block;
  F scale, minimum = zero();
  explicit TileDecoder(const std::uint8_t* at) : block(at), scale(halves_of_e8m0(at)) {}
  void start(int) {}
  Words word(int i) const {
    const Words code = nibbles(word_of(block, 1 + 4 * (i % 4)), i < 4 ? 0 : 4);
    return _mm512_shuffle_epi8(level_codes(kFp4Levels, kZero), code);
  }

 private:
  static F halves_of_e8m0(const std::uint8_t* at) {
    const Words e = _mm512_cvtepu8_epi32(sixteen(at));
    const Words normal = _mm512_slli_epi32(_mm512_sub_epi32(e, _mm512_set1_epi32(1)), 23);
    const Words tiny = _mm512_sllv_epi32(_mm512_set1_epi32(0x00200000), e);
    const __mmask16 is_tiny = _mm512_cmplt_epi32_mask(e, _mm512_set1_epi32(2));
    return {_mm512_castsi512_ps(_mm512_mask_mov_epi32(normal, is_tiny, tiny))};
  }
};

// --- int4 of safetensors files ------------------------------------------------------------------------------------------

template <>
struct TileDecoder<GgufType::INT4_BF16> : NibbleTile<2, 0, false> {
  static constexpr int kZero = 8;
  explicit TileDecoder(const std::uint8_t* at) : NibbleTile(at) { scale = load_bf16(reinterpret_cast<const bf16*>(at)); }
};

// The minimum is the scale times the integer that stands for zero, exact in fp32.
template <int groups>
struct ZeroPointTile {
  static constexpr int kGroup = 32, kGroups = groups, kZero = 0;
  static constexpr bool kHasMinimum = true;
  const std::uint8_t* block;
  F scale, minimum;
  int group = 0;
  explicit ZeroPointTile(const std::uint8_t* at) : block(at) {
    const Words words = word_of(at, 0);
    scale = {_mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(~255)))};
    minimum = mul(byte_of(words, 0), scale);
  }
  void start(int g) { group = g; }
  Words word(int i) const { return nibbles(word_of(block, 4 + 16 * group + 4 * (i % 4)), i < 4 ? 0 : 4); }
};
template <>
struct TileDecoder<GgufType::INT4_32> : ZeroPointTile<1> {
  using ZeroPointTile::ZeroPointTile;
};
template <>
struct TileDecoder<GgufType::INT4_128> : ZeroPointTile<4> {
  using ZeroPointTile::ZeroPointTile;
};

// --- K types ------------------------------------------------------------------------------------------------------------

// Scales and minima of Q4_K.
struct KScales {
  Words scales[2], minima[2];
  F d, least;

  explicit KScales(const std::uint8_t* at) : d(halves_of(at, 0)), least(halves_of(at, 2)) {
    const Words x = word_of(at, 4), y = word_of(at, 8), z = word_of(at, 12);
    const Words six = all_bytes(63), low = all_bytes(15), high = all_bytes(48);
    scales[0] = _mm512_and_si512(x, six);
    minima[0] = _mm512_and_si512(y, six);
    scales[1] = with_bits(_mm512_and_si512(z, low), _mm512_srli_epi16(x, 2), high);
    minima[1] = with_bits(_mm512_and_si512(_mm512_srli_epi16(z, 4), low), _mm512_srli_epi16(y, 2), high);
  }
};

template <>
struct TileDecoder<GgufType::Q4_K> {
  static constexpr int kGroup = 32, kGroups = 8, kZero = 0;
  static constexpr bool kHasMinimum = true;
  const std::uint8_t* block;
  KScales scales;
  F scale, minimum;
  int group = 0;
  explicit TileDecoder(const std::uint8_t* at) : block(at), scales(at) {}
  void start(int g) {
    group = g;
    scale = mul(byte_of(scales.scales[g / 4], g % 4), scales.d);
    minimum = mul(byte_of(scales.minima[g / 4], g % 4), scales.least);
  }
  Words word(int i) const { return nibbles(word_of(block, 16 + 32 * (group / 2) + 4 * i), group % 2 * 4); }
};

template <>
struct TileDecoder<GgufType::IQ4_XS> {
  static constexpr int kGroup = 32, kGroups = 8, kZero = 127;
  static constexpr bool kHasMinimum = false;
  const std::uint8_t* block;
  F d, scale, minimum = zero();
  int group = 0;
  explicit TileDecoder(const std::uint8_t* at) : block(at), d(halves_of(at, 0)) {}
  void start(int g) {
    group = g;
    const Words two = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + 16 * 2)));
    const auto bits = [](Words from, int shift, int mask) {
      return _mm512_and_si512(_mm512_srlv_epi32(from, _mm512_set1_epi32(shift)), _mm512_set1_epi32(mask));
    };
    const Words six = _mm512_or_si512(bits(word_of(block, 4), 4 * g, 15), _mm512_slli_epi32(bits(two, 2 * g, 3), 4));
    scale = mul({_mm512_cvtepi32_ps(_mm512_sub_epi32(six, _mm512_set1_epi32(32)))}, d);
  }
  Words word(int i) const {
    const Words code = nibbles(word_of(block, 8 + 16 * group + 4 * (i % 4)), i < 4 ? 0 : 4);
    return _mm512_shuffle_epi8(level_codes(kIq4Levels, kZero), code);
  }
};

}  // namespace lowlat::LOWLAT_ISA::gguf
