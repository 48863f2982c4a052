// AVX-512 decoders of fp4 and ternary GGUF blocks for integer dot products (gguf_codes.h).
#pragma once

#include "gguf_codes.h"

namespace lowlat::LOWLAT_ISA::gguf {

constexpr int kFp4Middle = 12;

template <>
struct Loader<GgufType::MXFP4> {
  static Codes load(const std::uint8_t* at, std::int64_t columns) {
    return with_blocks<17>(at, columns, [](const EightBlocks<17>& blocks) LOWLAT_INLINE {
      Codes codes;
      const __m512i levels = level_codes(kFp4Levels, kFp4Middle);
      LOWLAT_UNROLL
      for (int k = 0; k < 4; ++k) {
        const __m512i nibbles = block_nibbles(blocks.block(2 * k) + 1, blocks.block(2 * k + 1) + 1);
        codes.code[k] = _mm512_shuffle_epi8(levels, nibbles);
      }
      const __m256i exponents = _mm256_and_si256(blocks.starts(), _mm256_set1_epi32(255));
      const __m256i usual = _mm256_slli_epi32(_mm256_sub_epi32(exponents, _mm256_set1_epi32(1)), 23);
      const __m256i tiny = _mm256_sllv_epi32(_mm256_set1_epi32(0x00200000), exponents);
      const __mmask8 is_tiny = _mm256_cmplt_epi32_mask(exponents, _mm256_set1_epi32(2));
      codes.scale = wide_to_lanes(_mm256_castsi256_ps(_mm256_mask_mov_epi32(usual, is_tiny, tiny)));
      codes.minimum = set1(kFp4Middle);
      return codes;
    });
  }
};

// half_of_e4m3() of 16 numbers.
inline F halves_of_e4m3(__m128i bytes) {
  const __m512i x = _mm512_cvtepu8_epi32(bytes), small = _mm512_and_si512(x, _mm512_set1_epi32(127));
  const __m512i usual = _mm512_slli_epi32(_mm512_add_epi32(small, _mm512_set1_epi32((127 - 7 - 1) << 3)), 20);
  const __mmask16 tiny = _mm512_cmplt_epi32_mask(small, _mm512_set1_epi32(8));
  const F subnormal = mul({_mm512_cvtepi32_ps(small)}, set1(0x1p-10f));
  const __m512 all = _mm512_mask_mov_ps(_mm512_castsi512_ps(usual), tiny, subnormal.v);
  return {_mm512_maskz_mov_ps(_mm512_cmpneq_epi32_mask(x, _mm512_set1_epi32(127)), all)};
}

template <>
struct Loader<GgufType::NVFP4> {
  static constexpr int kBytes = 36;
  static Codes load(const std::uint8_t* at, std::int64_t columns) {
    if (columns < kSpan) {
      alignas(64) std::uint8_t blocks[4 * kBytes] = {};
      std::memcpy(blocks, at, columns / 64 * kBytes);
      return load(blocks, kSpan);
    }
    Codes codes;
    const __m512i levels = level_codes(kFp4Levels, kFp4Middle), twos = _mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3);
    const __m512i shift = _mm512_broadcast_i32x4(_mm_set_epi64x(0x0004000400040004, 0));
    LOWLAT_UNROLL
    for (int k = 0; k < 4; ++k) {
      const __m512i both = _mm512_permutexvar_epi64(twos, twice(at + k * kBytes + 4));
      const __m512i nibbles = _mm512_and_si512(_mm512_srlv_epi16(both, shift), all_bytes(15));
      codes.code[k] = _mm512_shuffle_epi8(levels, nibbles);
    }
    const auto word = [&](int k) { return static_cast<int>(word_at(at + k * kBytes)); };
    codes.scale = halves_of_e4m3(to_lanes(_mm_setr_epi32(word(0), word(1), word(2), word(3))));
    codes.minimum = mul(codes.scale, set1(kFp4Middle));
    return codes;
  }
};

template <>
struct Loader<GgufType::TQ2_0> {
  static Codes load(const std::uint8_t* b, std::int64_t) {
    const F scale = all_halves(b + 64);
    return {{two_bits<0>(b), two_bits<1>(b), two_bits<2>(b), two_bits<3>(b)}, scale, scale};
  }
};

}  // namespace lowlat::LOWLAT_ISA::gguf
