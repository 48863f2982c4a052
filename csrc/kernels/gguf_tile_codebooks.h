// AVX-512 decoder of interleaved GGUF blocks with a codebook of 256 entries (IQ2_XXS): the codebook is a table of bytes in
// registers, so entries of 16 rows are looked up without memory accesses.
#pragma once

#include "gguf_tile_decode.h"

namespace lowlat::LOWLAT_ISA::gguf {

// Byte `number` of the entries of a codebook of 2-bit levels: levels of columns 4 number to 4 number + 3.
struct ByteTable {
  alignas(64) std::uint8_t byte[256];

  constexpr ByteTable(const std::uint16_t (&entries)[256], int number) : byte() {
    for (int i = 0; i < 256; ++i) byte[i] = static_cast<std::uint8_t>(entries[i] >> 8 * number);
  }
  // The bytes of 64 entries; bit k of `high` and `low` is bit 7 and bit 6 of entry k.
  LOWLAT_INLINE Words at(Words entries, __mmask64 high, __mmask64 low) const {
    const auto quarter = [&](int number) LOWLAT_INLINE { return _mm512_load_si512(byte + 64 * number); };
    Words found = _mm512_permutexvar_epi8(entries, quarter(0));
    found = _mm512_mask_permutexvar_epi8(found, _kandn_mask64(high, low), entries, quarter(1));
    found = _mm512_mask_permutexvar_epi8(found, _kandn_mask64(low, high), entries, quarter(2));
    return _mm512_mask_permutexvar_epi8(found, _kand_mask64(high, low), entries, quarter(3));
  }
};

template <>
struct TileDecoder<GgufType::IQ2_XXS> {
  static constexpr int kGroup = 32, kGroups = 8, kParts = 1, kApart = 1, kZero = 64;
  static constexpr bool kHasMinimum = false;
  const std::uint8_t* block;
  F quarter;
  Words first[2], last[2], signs[2];  // of even and of odd groups

  explicit TileDecoder(const std::uint8_t* at) : block(at), quarter(mul(halves_of(at, 0), set1(0.25f))) {}
  LOWLAT_INLINE F scale(int g) const {
    const Words steps = _mm512_srli_epi32(word_of(block, 6 + 8 * g), 28);
    return mul(quarter, add({_mm512_cvtepi32_ps(steps)}, set1(0.5f)));
  }
  LOWLAT_INLINE void load_group(int g) {
    static constexpr ByteTable kFirst(kIq2XxsGrid, 0), kLast(kIq2XxsGrid, 1);
    const Words entries = word_of(block, 2 + 8 * g);
    const __mmask64 high = _mm512_movepi8_mask(entries), low = _mm512_movepi8_mask(_mm512_slli_epi16(entries, 1));
    first[g % 2] = kFirst.at(entries, high, low);
    last[g % 2] = kLast.at(entries, high, low);
    signs[g % 2] = even_sign_bytes(seven_bit_bytes(word_of(block, 6 + 8 * g)));
  }
  LOWLAT_INLINE Words word(int g, int i) const {
    const __m128i values = _mm_setr_epi8(72, 89, 107, 0, 56, 39, 21, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    const Words levels = bits_of(i < 4 ? first[g % 2] : last[g % 2], i % 4 * 2, 3);
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(values), with_high(levels, signs[g % 2], i, 2, 1));
  }
};

}  // namespace lowlat::LOWLAT_ISA::gguf
