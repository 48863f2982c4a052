// AVX-512 decoders of interleaved GGUF blocks: 16 rows at once, a lane is a row.
#pragma once

#include "gguf_codes_iq.h"

namespace lowlat::LOWLAT_ISA::gguf {

// Decodes a block of 16 rows. weight = scale(g) * (code - kZero) - minimum(g) for the columns of group g; word(g, i) holds
// the codes of four of them. Group and word are constants after unrolling; blocks of kParts parts have a member `part`.
// Groups kApart from each other share bytes.
template <GgufType type>
struct TileDecoder;

// Whether word(g, i) holds columns i, 8 + i, 16 + i and 24 + i of a group instead of four consecutive ones, after
// load_group(g).
template <class Decoder>
constexpr bool kHasWordsOfEights = requires(Decoder& decoder) { decoder.load_group(0); };

// Whether raw_word(g, i) holds codes times a power of two, which raw_scale(g) divides by: they take no shifts.
template <class Decoder>
constexpr bool kHasRawWords = requires(const Decoder& decoder) { decoder.raw_word(0, 0); };

using Words = __m512i;

inline Words word_of(const std::uint8_t* block, int offset) { return pairs(block + 16 * offset).v; }
inline F halves_of(const std::uint8_t* block, int offset) {
  return load_fp16(reinterpret_cast<const fp16*>(block + 16 * offset));
}
// Bits `from` of 16-bit lanes moved to bits `to`; constants after unrolling.
LOWLAT_INLINE inline Words moved(Words words, int from, int to) {
  if (from == to) return words;
  const Words by = _mm512_set1_epi16(static_cast<short>(from > to ? from - to : to - from));
  return from > to ? _mm512_srlv_epi16(words, by) : _mm512_sllv_epi16(words, by);
}
// Bits of every byte from bit `from`, as numbers.
LOWLAT_INLINE inline Words bits_of(Words words, int from, int mask) {
  return _mm512_and_si512(moved(words, from, 0), all_bytes(mask));
}
LOWLAT_INLINE inline Words nibbles(Words words, int shift) { return bits_of(words, shift, 15); }
// Bits from `from` of `high`, moved to bits `to` and added to numbers below them.
LOWLAT_INLINE inline Words with_high(Words low, Words high, int from, int to, int mask) {
  return with_bits(low, moved(high, from, to), all_bytes(mask << to));
}

// 2^24 times byte `number`, signed, of every lane: the byte becomes the highest.
LOWLAT_INLINE inline F byte_of(Words words, int number) {
  const auto top = static_cast<int>(0x00808080u | static_cast<unsigned>(number) << 24);
  const auto from = [&](int lane) { return top + (4 * lane << 24); };
  const Words all = _mm512_broadcast_i32x4(_mm_setr_epi32(from(0), from(1), from(2), from(3)));
  return {_mm512_cvtepi32_ps(_mm512_shuffle_epi8(words, all))};
}
// What byte_of() is multiplied with.
inline F scale_of_bytes(const std::uint8_t* block, int offset) { return mul(halves_of(block, offset), set1(0x1p-24f)); }

// --- blocks of 32 columns ---------------------------------------------------------------------------------------------

// Four bits per column from `data`, fifth bits from `fifth` (0: none).
template <int data, int fifth, bool has_minimum>
struct NibbleTile {
  static constexpr int kGroup = 32, kGroups = 1, kParts = 1, kApart = 1;
  static constexpr bool kHasMinimum = has_minimum;

  const std::uint8_t* block;
  F factor;

  explicit NibbleTile(const std::uint8_t* at) : block(at), factor(halves_of(at, 0)) {}
  LOWLAT_INLINE F scale(int) const { return factor; }
  LOWLAT_INLINE F minimum(int) const { return sub(zero(), halves_of(block, 2)); }
  LOWLAT_INLINE Words word(int, int i) const {
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
  LOWLAT_INLINE Words word(int g, int i) const {
    return _mm512_shuffle_epi8(level_codes(kIq4Levels, kZero), NibbleTile::word(g, i));
  }
};

template <>
struct TileDecoder<GgufType::Q8_0> {
  static constexpr int kGroup = 32, kGroups = 1, kParts = 1, kApart = 1, kZero = 128;
  static constexpr bool kHasMinimum = false;
  const std::uint8_t* block;
  F factor;
  explicit TileDecoder(const std::uint8_t* at) : block(at), factor(halves_of(at, 0)) {}
  LOWLAT_INLINE F scale(int) const { return factor; }
  LOWLAT_INLINE Words word(int, int i) const { return plus_128({word_of(block, 2 + 4 * i)}).v; }
};

template <>
struct TileDecoder<GgufType::MXFP4> {
  static constexpr int kGroup = 32, kGroups = 1, kParts = 1, kApart = 1, kZero = 12;
  static constexpr bool kHasMinimum = false;
  const std::uint8_t* block;
  F factor;
  explicit TileDecoder(const std::uint8_t* at) : block(at), factor(halves_of_e8m0(at)) {}
  LOWLAT_INLINE F scale(int) const { return factor; }
  LOWLAT_INLINE Words word(int, int i) const {
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
  explicit TileDecoder(const std::uint8_t* at) : NibbleTile(at) { factor = load_bf16(reinterpret_cast<const bf16*>(at)); }
};

// The minimum is the scale times the integer that stands for zero, exact in fp32.
template <int groups>
struct ZeroPointTile {
  static constexpr int kGroup = 32, kGroups = groups, kParts = 1, kApart = 1, kZero = 0;
  static constexpr bool kHasMinimum = true;
  const std::uint8_t* block;
  F factor, least;
  explicit ZeroPointTile(const std::uint8_t* at) : block(at) {
    const Words words = word_of(at, 0);
    factor = {_mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(~255)))};
    least = mul(mul(byte_of(words, 0), set1(0x1p-24f)), factor);
  }
  LOWLAT_INLINE F scale(int) const { return factor; }
  LOWLAT_INLINE F minimum(int) const { return least; }
  LOWLAT_INLINE Words word(int g, int i) const { return nibbles(word_of(block, 4 + 16 * g + 4 * (i % 4)), i < 4 ? 0 : 4); }
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

// Scales and minima of Q4_K and Q5_K.
struct KScales {
  static constexpr int kGroup = 32, kGroups = 8, kParts = 1, kApart = 1, kZero = 0;
  static constexpr bool kHasMinimum = true;
  const std::uint8_t* block;
  F d, least;
  Words scales[2], minima[2];

  explicit KScales(const std::uint8_t* at) : block(at), d(scale_of_bytes(at, 0)), least(scale_of_bytes(at, 2)) {
    const Words x = word_of(at, 4), y = word_of(at, 8), z = word_of(at, 12);
    scales[0] = bits_of(x, 0, 63);
    minima[0] = bits_of(y, 0, 63);
    scales[1] = with_high(nibbles(z, 0), x, 6, 4, 3);
    minima[1] = with_high(nibbles(z, 4), y, 6, 4, 3);
  }
  LOWLAT_INLINE F scale(int g) const { return mul(byte_of(scales[g / 4], g % 4), d); }
  LOWLAT_INLINE F minimum(int g) const { return mul(byte_of(minima[g / 4], g % 4), least); }
  // Four bits per column.
  LOWLAT_INLINE Words low(int data, int g, int i) const {
    return nibbles(word_of(block, data + 32 * (g / 2) + 4 * i), g % 2 * 4);
  }
};

template <>
struct TileDecoder<GgufType::Q4_K> : KScales {
  using KScales::KScales;
  LOWLAT_INLINE Words word(int g, int i) const { return low(16, g, i); }
  LOWLAT_INLINE Words raw_word(int g, int i) const {
    return _mm512_and_si512(word_of(block, 16 + 32 * (g / 2) + 4 * i), all_bytes(g % 2 == 0 ? 15 : 240));
  }
  LOWLAT_INLINE F raw_scale(int g) const {
    return mul(byte_of(scales[g / 4], g % 4), g % 2 == 0 ? d : mul(d, set1(1.0f / 16)));
  }
};

template <>
struct TileDecoder<GgufType::Q5_K> : KScales {
  using KScales::KScales;
  LOWLAT_INLINE Words word(int g, int i) const {
    return with_high(low(48, g, i), word_of(block, 16 + 4 * i), g, 4, 1);
  }
};

// Types with a signed scale for 16 columns each, in two parts of 128 columns. Bits of a column: those of 32 consecutive
// columns are at one place of 32 bytes, those of the next 32 follow them in the same bytes.
template <int middle>
struct SixteensTile {
  static constexpr int kGroup = 16, kGroups = 8, kParts = 2, kApart = 4, kZero = middle;
  static constexpr bool kHasMinimum = false;
  const std::uint8_t* block;
  F d;
  Words scales[4];
  int part = 0;

  SixteensTile(const std::uint8_t* at, int offset) : block(at), d(scale_of_bytes(at, offset)) {}
  LOWLAT_INLINE F scale(int g) const { return mul(byte_of(scales[2 * part + g / 4], g % 4), d); }
  // Of a run of 32 columns; `data` has `bytes` per part.
  LOWLAT_INLINE Words word_in_run(int data, int bytes, int g, int i) const {
    return word_of(block + 16 * bytes * part, data + 16 * (g % 2) + 4 * i);
  }
  // Two bits per column: four runs share 32 bytes.
  LOWLAT_INLINE Words two_bits(int data, int g, int i) const { return bits_of(word_in_run(data, 32, g, i), g / 2 * 2, 3); }
};

template <>
struct TileDecoder<GgufType::Q2_K> : SixteensTile<0> {
  static constexpr bool kHasMinimum = true;
  F least, run_scale[4];
  Words minima[4];

  explicit TileDecoder(const std::uint8_t* at) : SixteensTile(at, 80), least(scale_of_bytes(at, 82)) {
    LOWLAT_UNROLL
    for (int run = 0; run < 4; ++run) run_scale[run] = mul(d, set1(1.0f / (1 << 2 * run)));
    LOWLAT_UNROLL
    for (int k = 0; k < 4; ++k) {
      const Words both = word_of(at, 4 * k);
      scales[k] = nibbles(both, 0);
      minima[k] = nibbles(both, 4);
    }
  }
  LOWLAT_INLINE F minimum(int g) const { return mul(byte_of(minima[2 * part + g / 4], g % 4), least); }
  LOWLAT_INLINE Words word(int g, int i) const { return two_bits(16, g, i); }
  LOWLAT_INLINE Words raw_word(int g, int i) const {
    return _mm512_and_si512(word_in_run(16, 32, g, i), all_bytes(3 << g / 2 * 2));
  }
  LOWLAT_INLINE F raw_scale(int g) const { return mul(byte_of(scales[2 * part + g / 4], g % 4), run_scale[g / 2]); }
};

template <>
struct TileDecoder<GgufType::Q3_K> : SixteensTile<4> {
  explicit TileDecoder(const std::uint8_t* at) : SixteensTile(at, 108) {
    const Words low[2] = {word_of(at, 96), word_of(at, 100)}, high = word_of(at, 104);
    LOWLAT_UNROLL
    for (int k = 0; k < 4; ++k) {
      const Words six = with_high(nibbles(low[k % 2], k / 2 * 4), high, 2 * k, 4, 3);
      scales[k] = _mm512_sub_epi8(six, all_bytes(32));
    }
  }
  // Third bits: bits 4 * part to 4 * part + 3 of the same 32 bytes.
  LOWLAT_INLINE Words word(int g, int i) const {
    const Words high = _mm512_srlv_epi16(word_in_run(0, 0, g, i), _mm512_set1_epi16(static_cast<short>(4 * part)));
    return with_high(two_bits(32, g, i), high, g / 2, 2, 1);
  }
};

template <>
struct TileDecoder<GgufType::Q6_K> : SixteensTile<32> {
  explicit TileDecoder(const std::uint8_t* at) : SixteensTile(at, 208) {
    LOWLAT_UNROLL
    for (int k = 0; k < 4; ++k) scales[k] = word_of(at, 192 + 4 * k);
  }
  LOWLAT_INLINE Words word(int g, int i) const {
    const int run = g / 2;
    const Words low = nibbles(word_in_run(32 * (run % 2), 64, g, i), run / 2 * 4);
    return with_high(low, word_in_run(128, 32, g, i), 2 * run, 4, 3);
  }
};

template <>
struct TileDecoder<GgufType::IQ4_XS> {
  static constexpr int kGroup = 32, kGroups = 8, kParts = 1, kApart = 1, kZero = 127;
  static constexpr bool kHasMinimum = false;
  const std::uint8_t* block;
  F d;
  Words scales[2];  // of even and of odd groups

  explicit TileDecoder(const std::uint8_t* at) : block(at), d(scale_of_bytes(at, 0)) {
    const Words low = word_of(at, 4), high = spread(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 16 * 2)));
    scales[0] = _mm512_sub_epi8(with_high(nibbles(low, 0), high, 0, 4, 3), all_bytes(32));
    scales[1] = _mm512_sub_epi8(with_high(nibbles(low, 4), high, 2, 4, 3), all_bytes(32));
  }
  LOWLAT_INLINE F scale(int g) const { return mul(byte_of(scales[g % 2], g / 2), d); }
  LOWLAT_INLINE Words word(int g, int i) const {
    const Words code = nibbles(word_of(block, 8 + 16 * g + 4 * (i % 4)), i < 4 ? 0 : 4);
    return _mm512_shuffle_epi8(level_codes(kIq4Levels, kZero), code);
  }

 private:
  // Four bits in each byte of a word from 16 bits.
  static Words spread(__m256i sixteens) {
    const Words all = _mm512_cvtepu16_epi32(sixteens);
    const Words twos = _mm512_and_si512(_mm512_or_si512(all, _mm512_slli_epi32(all, 8)), _mm512_set1_epi32(0x00ff00ff));
    return _mm512_or_si512(twos, _mm512_slli_epi32(twos, 4));
  }
};

}  // namespace lowlat::LOWLAT_ISA::gguf
