// AVX-512 decoders of GGUF blocks for integer dot products: 256 columns as unsigned bytes in four registers. The IQ types
// with codebooks are in gguf_codes_iq.h.
#pragma once

#include "gguf_span.h"

namespace lowlat::LOWLAT_ISA::gguf {

// weight = scale * code - minimum. Scale and minimum of group 4 k + j are in lane 4 j + k (gguf_gemv.h).
struct Codes {
  __m512i code[4];  // 64 columns each
  F scale, minimum;
};

// Whether weight = scale * (code - minimum) instead: scales of MXFP4 reach 2^127, of which fp32 holds no multiple.
template <GgufType type>
constexpr bool kMinimumInSteps = type == GgufType::MXFP4;

// Scales of 16 columns each in their order, to their lanes.
inline F to_lanes(F groups) {
  const __m512i from = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return {_mm512_permutexvar_ps(from, groups.v)};
}
inline __m128i to_lanes(__m128i groups) {
  return _mm_shuffle_epi8(groups, _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
}
// The same for scales of 32 columns each.
inline F wide_to_lanes(__m256 groups) {
  const __m512i from = _mm512_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6, 1, 3, 5, 7, 1, 3, 5, 7);
  return {_mm512_permutexvar_ps(from, _mm512_castps256_ps512(groups))};
}
inline __m128i wide_to_lanes(__m128i groups) {
  return _mm_shuffle_epi8(groups, _mm_setr_epi8(0, 2, 4, 6, 0, 2, 4, 6, 1, 3, 5, 7, 1, 3, 5, 7));
}

inline F floats_of_bytes(__m128i unsigned_bytes) { return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(unsigned_bytes))}; }
inline F floats_of_signed(__m128i bytes) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))}; }

// The fp16 number at p in all lanes.
inline F all_halves(const std::uint8_t* p) {
  const __m128i bits = _mm_cvtsi32_si128(static_cast<int>(short_at(p)));
  return {_mm512_broadcastss_ps(_mm_cvtph_ps(bits))};
}

inline __m512i twice(const std::uint8_t* p) {
  return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __m128i sixteen(const std::uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

// Shift counts of 16-bit lanes: `low` for the first half of a register, `high` for the second.
template <int low, int high>
inline __m512i halves() {
  return _mm512_inserti64x4(_mm512_set1_epi16(low), _mm256_set1_epi16(high), 1);
}

inline __m512i all_bytes(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }

// a | (b & mask)
inline __m512i with_bits(__m512i a, __m512i b, __m512i mask) { return _mm512_ternarylogic_epi32(a, b, mask, 0xf8); }

// The general case: codes are values + 128.
template <GgufType type>
struct Loader {
  static Codes load(const std::uint8_t* at, std::int64_t columns) {
    Span span;
    decode_span<type>(at, columns, span);
    Codes codes;
    for (int k = 0; k < 4; ++k) codes.code[k] = plus_128(pairs(span.value + 64 * k)).v;
    codes.scale = to_lanes(gguf_load(span.scale));
    codes.minimum = mul(codes.scale, set1(128.0f));
    if constexpr (Decoder<type>::kHasMinimum) codes.minimum = add(codes.minimum, to_lanes(gguf_load(span.minimum)));
    return codes;
  }

 private:
  static F gguf_load(const float* p) { return simd::load(p); }
};

// --- K types ----------------------------------------------------------------------------------------------------------

// Two bits per column, part k of 64 columns.
template <int k>
inline __m512i two_bits(const std::uint8_t* bytes) {
  const __m512i shifted = _mm512_srlv_epi16(twice(bytes + 32 * (k / 2)), halves<4 * (k % 2), 4 * (k % 2) + 2>());
  return _mm512_and_si512(shifted, all_bytes(3));
}

// Bit 2 k of 32 bytes for the first 32 columns, bit 2 k + 1 for the next, moved to bit `to`.
template <int k, int to>
inline __m512i one_bit(__m512i bytes) {
  constexpr int first = 2 * k, last = 2 * k + 1;
  if constexpr (last <= to) return _mm512_sllv_epi16(bytes, halves<to - first, to - last>());
  if constexpr (first >= to) return _mm512_srlv_epi16(bytes, halves<first - to, last - to>());
  return bytes;
}
template <>
struct Loader<GgufType::Q2_K> {
  static Codes load(const std::uint8_t* b, std::int64_t) {
    const __m128i scales = to_lanes(sixteen(b)), low = _mm_set1_epi8(15);
    return {{two_bits<0>(b + 16), two_bits<1>(b + 16), two_bits<2>(b + 16), two_bits<3>(b + 16)},
            mul(floats_of_bytes(_mm_and_si128(scales, low)), all_halves(b + 80)),
            mul(floats_of_bytes(_mm_and_si128(_mm_srli_epi16(scales, 4), low)), all_halves(b + 82))};
  }
};

template <>
struct Loader<GgufType::Q3_K> {
  static Codes load(const std::uint8_t* b, std::int64_t) {
    const __m512i high = twice(b), four = all_bytes(4);
    const std::uint8_t* low = b + 32;
    const F scale = mul(floats_of_signed(to_lanes(scales(b + 96))), all_halves(b + 108));
    return {{with_bits(two_bits<0>(low), one_bit<0, 2>(high), four), with_bits(two_bits<1>(low), one_bit<1, 2>(high), four),
             with_bits(two_bits<2>(low), one_bit<2, 2>(high), four), with_bits(two_bits<3>(low), one_bit<3, 2>(high), four)},
            scale, mul(scale, set1(4.0f))};
  }

 private:
  static __m128i scales(const std::uint8_t* s) {
    const std::uint32_t a = word_at(s), b = word_at(s + 4), c = word_at(s + 8);
    constexpr std::uint32_t kLow = 0x0f0f0f0f, kHigh = 0x30303030;
    const auto word = [](std::uint32_t x) { return static_cast<int>(x); };
    const __m128i all =
        _mm_setr_epi32(word((a & kLow) | (c << 4 & kHigh)), word((b & kLow) | (c << 2 & kHigh)),
                       word((a >> 4 & kLow) | (c & kHigh)), word((b >> 4 & kLow) | (c >> 2 & kHigh)));
    return _mm_sub_epi8(all, _mm_set1_epi8(32));
  }
};

// Scales and minima of Q4_K and Q5_K.
inline void load_k_scales(const std::uint8_t* b, Codes& codes) {
  const std::uint32_t x = word_at(b + 4), y = word_at(b + 8), z = word_at(b + 12);
  constexpr std::uint32_t kSix = 0x3f3f3f3f, kLow = 0x0f0f0f0f, kHigh = 0x30303030;
  const auto joined = [](std::uint32_t first, std::uint32_t last) {
    return _mm_cvtsi64_si128(static_cast<long long>(first | static_cast<std::uint64_t>(last) << 32));
  };
  const __m128i scales = joined(x & kSix, (z & kLow) | (x >> 2 & kHigh));
  const __m128i minima = joined(y & kSix, (z >> 4 & kLow) | (y >> 2 & kHigh));
  codes.scale = mul(floats_of_bytes(wide_to_lanes(scales)), all_halves(b));
  codes.minimum = mul(floats_of_bytes(wide_to_lanes(minima)), all_halves(b + 2));
}

// Four bits per column: 32 bytes are 64 columns.
inline __m512i four_bits(const std::uint8_t* bytes) {
  return _mm512_and_si512(_mm512_srlv_epi16(twice(bytes), halves<0, 4>()), all_bytes(15));
}

template <>
struct Loader<GgufType::Q4_K> {
  static Codes load(const std::uint8_t* b, std::int64_t) {
    Codes codes;
    LOWLAT_UNROLL
    for (int k = 0; k < 4; ++k) codes.code[k] = four_bits(b + 16 + 32 * k);
    load_k_scales(b, codes);
    return codes;
  }
};

template <>
struct Loader<GgufType::Q5_K> {
  static Codes load(const std::uint8_t* b, std::int64_t) {
    const __m512i high = twice(b + 16), bit = all_bytes(16);
    const std::uint8_t* low = b + 48;
    Codes codes{{with_bits(four_bits(low), one_bit<0, 4>(high), bit), with_bits(four_bits(low + 32), one_bit<1, 4>(high), bit),
                 with_bits(four_bits(low + 64), one_bit<2, 4>(high), bit),
                 with_bits(four_bits(low + 96), one_bit<3, 4>(high), bit)},
                zero(), zero()};
    load_k_scales(b, codes);
    return codes;
  }
};

template <>
struct Loader<GgufType::Q6_K> {
  static Codes load(const std::uint8_t* b, std::int64_t) {
    Codes codes;
    LOWLAT_UNROLL
    for (int half = 0; half < 2; ++half) {
      const __m512i low = pairs(b + 64 * half).v, high = twice(b + 128 + 32 * half);
      const __m512i nibble = all_bytes(15), two = all_bytes(48);
      codes.code[2 * half] =
          with_bits(_mm512_and_si512(low, nibble), _mm512_sllv_epi16(high, halves<4, 2>()), two);
      codes.code[2 * half + 1] = with_bits(_mm512_and_si512(_mm512_srli_epi16(low, 4), nibble),
                                           _mm512_srlv_epi16(high, halves<0, 2>()), two);
    }
    codes.scale = mul(floats_of_signed(to_lanes(sixteen(b + 192))), all_halves(b + 208));
    codes.minimum = mul(codes.scale, set1(32.0f));
    return codes;
  }
};

// --- blocks of 32 columns: eight blocks ---------------------------------------------------------------------------------

// Eight blocks of a span, or the last ones of a row: the last of them stands for those beyond it, whose activations are
// zeros.
template <int bytes>
struct EightBlocks {
  const std::uint8_t* at;
  int last;

  EightBlocks(const std::uint8_t* at, std::int64_t columns) : at(at), last(static_cast<int>(columns / 32) - 1) {}
  const std::uint8_t* block(int i) const { return at + (i < last ? i : last) * bytes; }

  // The 32 bits at the start of each.
  __m256i starts() const {
    const __m256i number = _mm256_min_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(last));
    const __m256i index = _mm256_mullo_epi32(number, _mm256_set1_epi32(bytes));
    return _mm256_i32gather_epi32(reinterpret_cast<const int*>(at), index, 1);
  }
};

inline F halves_to_lanes(__m256i words) { return wide_to_lanes(_mm256_cvtph_ps(_mm256_cvtepi32_epi16(words))); }

// 16 bytes of two blocks, each twice, as 4-bit numbers: 64 columns.
inline __m512i block_nibbles(const std::uint8_t* first, const std::uint8_t* last) {
  const __m512i low = _mm512_broadcast_i32x4(sixteen(first));
  const __m512i both = _mm512_mask_broadcast_i32x4(low, 0xff00, sixteen(last));
  const __m512i shift = _mm512_broadcast_i64x4(_mm256_setr_m128i(_mm_setzero_si128(), _mm_set1_epi16(4)));
  return _mm512_and_si512(_mm512_srlv_epi16(both, shift), all_bytes(15));
}

// Adds 16 where a bit of the fifth bits of two blocks is set.
inline __m512i add_fifth(__m512i nibbles, const std::uint8_t* first, const std::uint8_t* last) {
  const __mmask64 set = word_at(first) | static_cast<std::uint64_t>(word_at(last)) << 32;
  return _mm512_mask_add_epi8(nibbles, set, nibbles, all_bytes(16));
}

// Only inlined is the number of blocks of a whole span a constant.
#define LOWLAT_INLINE __attribute__((always_inline))

// Calls body(blocks) for the blocks of a span, with a constant number of them if it is whole.
template <int bytes, class Body>
inline Codes with_blocks(const std::uint8_t* at, std::int64_t columns, Body&& body) {
  return columns == kSpan ? body(EightBlocks<bytes>(at, kSpan)) : body(EightBlocks<bytes>(at, columns));
}

// Types of 32 columns: `data` and `fifth` are places in a block (fifth 0: none), `zero` is the code of 0.
template <GgufType type, int bytes, int data, int fifth, int middle>
struct SmallLoader {
  static Codes load(const std::uint8_t* at, std::int64_t columns) {
    return with_blocks<bytes>(at, columns, [](const EightBlocks<bytes>& blocks) LOWLAT_INLINE {
      Codes codes;
      LOWLAT_UNROLL
      for (int k = 0; k < 4; ++k) {
        const std::uint8_t *first = blocks.block(2 * k), *last = blocks.block(2 * k + 1);
        codes.code[k] = block_nibbles(first + data, last + data);
        if constexpr (fifth > 0) codes.code[k] = add_fifth(codes.code[k], first + fifth, last + fifth);
      }
      const __m256i words = blocks.starts();
      codes.scale = halves_to_lanes(words);
      if constexpr (Decoder<type>::kHasMinimum) {
        codes.minimum = sub(zero(), halves_to_lanes(_mm256_srli_epi32(words, 16)));
      } else {
        codes.minimum = mul(codes.scale, set1(middle));
      }
      return codes;
    });
  }
};

template <>
struct Loader<GgufType::Q4_0> : SmallLoader<GgufType::Q4_0, 18, 2, 0, 8> {};
template <>
struct Loader<GgufType::Q4_1> : SmallLoader<GgufType::Q4_1, 20, 4, 0, 0> {};
template <>
struct Loader<GgufType::Q5_0> : SmallLoader<GgufType::Q5_0, 22, 6, 2, 16> {};
template <>
struct Loader<GgufType::Q5_1> : SmallLoader<GgufType::Q5_1, 24, 8, 4, 0> {};

inline __m512i level_codes(const std::int8_t (&levels)[16], int middle) {
  const __m128i values = sixteen(reinterpret_cast<const std::uint8_t*>(levels));
  return _mm512_broadcast_i32x4(_mm_add_epi8(values, _mm_set1_epi8(static_cast<char>(middle))));
}

template <>
struct Loader<GgufType::IQ4_NL> {
  using Nibbles = SmallLoader<GgufType::IQ4_NL, 18, 2, 0, 127>;
  static Codes load(const std::uint8_t* at, std::int64_t columns) {
    Codes codes = Nibbles::load(at, columns);
    const __m512i levels = level_codes(kIq4Levels, 127);
    for (__m512i& code : codes.code) code = _mm512_shuffle_epi8(levels, code);
    return codes;
  }
};

template <>
struct Loader<GgufType::IQ4_XS> {
  static Codes load(const std::uint8_t* b, std::int64_t) {
    Codes codes;
    const __m512i levels = level_codes(kIq4Levels, 127);
    LOWLAT_UNROLL
    for (int k = 0; k < 4; ++k) {
      const std::uint8_t* bytes = b + 8 + 32 * k;
      codes.code[k] = _mm512_shuffle_epi8(levels, block_nibbles(bytes, bytes + 16));
    }
    const __m256i eight = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i low = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(word_at(b + 4))), _mm256_slli_epi32(eight, 2));
    const __m256i high = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(short_at(b + 2))), _mm256_slli_epi32(eight, 1));
    const __m256i bits = _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi32(15)),
                                         _mm256_slli_epi32(_mm256_and_si256(high, _mm256_set1_epi32(3)), 4));
    const __m256 scales = _mm256_cvtepi32_ps(_mm256_sub_epi32(bits, _mm256_set1_epi32(32)));
    codes.scale = mul(wide_to_lanes(scales), all_halves(b));
    codes.minimum = mul(codes.scale, set1(127.0f));
    return codes;
  }
};

template <>
struct Loader<GgufType::Q8_0> {
  static Codes load(const std::uint8_t* at, std::int64_t columns) {
    return with_blocks<34>(at, columns, [](const EightBlocks<34>& blocks) LOWLAT_INLINE {
      Codes codes;
      LOWLAT_UNROLL
      for (int k = 0; k < 4; ++k) {
        const auto* last = reinterpret_cast<const __m256i*>(blocks.block(2 * k + 1) + 2);
        const __m512i both = _mm512_mask_broadcast_i64x4(twice(blocks.block(2 * k) + 2), 0xf0, _mm256_loadu_si256(last));
        codes.code[k] = plus_128({both}).v;
      }
      codes.scale = halves_to_lanes(blocks.starts());
      codes.minimum = mul(codes.scale, set1(128.0f));
      return codes;
    });
  }
};

}  // namespace lowlat::LOWLAT_ISA::gguf
