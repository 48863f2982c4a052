// AVX-512 decoders of GGUF's IQ types with codebooks, of fp4 and ternary blocks (gguf_codes.h).
#pragma once

#include "gguf_codes.h"

namespace lowlat::LOWLAT_ISA::gguf {

constexpr int kSignedMiddle = 64;  // code of 0 of types with signs

// 16 vectors of 8 integers for two codes of 64 columns each, by their entries.
inline void look_up(const std::uint64_t* table, __m512i entries, __m512i (&values)[2]) {
  values[0] = _mm512_i32gather_epi64(_mm512_castsi512_si256(entries), table, 8);
  values[1] = _mm512_i32gather_epi64(_mm512_extracti64x4_epi64(entries, 1), table, 8);
}

// Sign bytes of 16 vectors of 8 integers from 7 bits in each lane: the number of negative ones is even.
inline __m128i sign_bytes(__m512i sevens) {
  const __m512i s = _mm512_and_si512(sevens, _mm512_set1_epi32(127));
  const __m512i nibble = _mm512_and_si512(_mm512_xor_si512(s, _mm512_srli_epi32(s, 4)), _mm512_set1_epi32(15));
  const __m512i odd = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, -128, -128, 0, -128, 0, 0, -128, -128, 0, 0, -128, 0, -128, -128, 0));
  return _mm512_cvtepi32_epi8(_mm512_or_si512(s, _mm512_shuffle_epi8(odd, nibble)));
}

// Codes of magnitudes with a sign bit each.
inline __m512i signed_codes(__m512i magnitudes, std::uint64_t signs) {
  const __m512i middle = all_bytes(kSignedMiddle);
  return _mm512_mask_sub_epi8(_mm512_add_epi8(middle, magnitudes), signs, middle, magnitudes);
}

inline void put_signed_codes(const __m512i (&values)[2], __m128i signs, __m512i* codes) {
  codes[0] = signed_codes(values[0], static_cast<std::uint64_t>(_mm_cvtsi128_si64(signs)));
  codes[1] = signed_codes(values[1], static_cast<std::uint64_t>(_mm_extract_epi64(signs, 1)));
}

inline std::uint64_t quad_at(const std::uint8_t* p) {
  std::uint64_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

inline __m512i lanes_of(int a, int b, int c, int d) {
  return _mm512_setr_epi32(a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d);
}
inline __m512i four_times(int a, int b, int c, int d) {
  return _mm512_setr_epi32(a, b, c, d, a, b, c, d, a, b, c, d, a, b, c, d);
}
inline __m512i bytes_to_lanes(const std::uint8_t* p) { return _mm512_cvtepu8_epi32(sixteen(p)); }

// Four lanes, each four times.
inline __m512i each_four_times(__m128i lanes) {
  return _mm512_permutexvar_epi32(lanes_of(0, 1, 2, 3), _mm512_castsi128_si512(lanes));
}

// d * factor * (0.5 + scale) of 8 or 16 integers.
inline F offset_scales(F scales, const std::uint8_t* d, float factor) {
  return mul(mul(all_halves(d), set1(factor)), add(scales, set1(0.5f)));
}
inline F top_scales(__m256i words, const std::uint8_t* d, float factor) {
  return offset_scales(wide_to_lanes(_mm256_cvtepi32_ps(_mm256_srli_epi32(words, 28))), d, factor);
}

template <>
struct Loader<GgufType::IQ2_XXS> {
  static Codes load(const std::uint8_t* b, std::int64_t) {
    const __m512i words = pairs(b + 2).v;
    const __m512i split = _mm512_permutexvar_epi32(
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15), words);
    const __m256i entries = _mm512_castsi512_si256(split), signs = _mm512_extracti64x4_epi64(split, 1);
    const __m512i shifts = four_times(0, 7, 14, 21);
    Codes codes;
    __m512i values[2];
    look_up(kIq2XxsWords.data(), _mm512_cvtepu8_epi32(_mm256_castsi256_si128(entries)), values);
    put_signed_codes(values, sign_bytes(_mm512_srlv_epi32(each_four_times(_mm256_castsi256_si128(signs)), shifts)),
                     codes.code);
    look_up(kIq2XxsWords.data(), _mm512_cvtepu8_epi32(_mm256_extracti128_si256(entries, 1)), values);
    put_signed_codes(values, sign_bytes(_mm512_srlv_epi32(each_four_times(_mm256_extracti128_si256(signs, 1)), shifts)),
                     codes.code + 2);
    codes.scale = top_scales(signs, b, 0.25f);
    codes.minimum = mul(codes.scale, set1(kSignedMiddle));
    return codes;
  }
};

// Scales of 4 bits for 16 columns each.
inline F nibble_scales(const std::uint8_t* nibbles, const std::uint8_t* d) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(nibbles)), low = _mm_set1_epi8(15);
  const __m128i all = _mm_unpacklo_epi8(_mm_and_si128(bytes, low), _mm_and_si128(_mm_srli_epi16(bytes, 4), low));
  return offset_scales(floats_of_bytes(to_lanes(all)), d, 0.25f);
}

template <>
struct Loader<GgufType::IQ2_XS> {
  static Codes load(const std::uint8_t* b, std::int64_t) {
    Codes codes;
    LOWLAT_UNROLL
    for (int half = 0; half < 2; ++half) {
      const __m512i entries = _mm512_cvtepu16_epi32(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + 2 + 32 * half)));
      __m512i values[2];
      look_up(kIq2XsWords.data(), _mm512_and_si512(entries, _mm512_set1_epi32(511)), values);
      put_signed_codes(values, sign_bytes(_mm512_srli_epi32(entries, 9)), codes.code + 2 * half);
    }
    codes.scale = nibble_scales(b + 66, b);
    codes.minimum = mul(codes.scale, set1(kSignedMiddle));
    return codes;
  }
};

// `bits` bits of a lane after a shift, times 256: the high part of an entry.
inline __m512i high_part(__m512i lanes, __m512i shifts, int mask) {
  return _mm512_slli_epi32(_mm512_and_si512(_mm512_srlv_epi32(lanes, shifts), _mm512_set1_epi32(mask)), 8);
}

template <>
struct Loader<GgufType::IQ2_S> {
  static Codes load(const std::uint8_t* b, std::int64_t) {
    const __m512i shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    Codes codes;
    LOWLAT_UNROLL
    for (int half = 0; half < 2; ++half) {
      const __m512i high = _mm512_set1_epi32(static_cast<int>(word_at(b + 66 + 4 * half)));
      __m512i values[2];
      look_up(kIq2SWords.data(), _mm512_or_si512(bytes_to_lanes(b + 2 + 16 * half), high_part(high, shifts, 3)), values);
      put_signed_codes(values, sixteen(b + 34 + 16 * half), codes.code + 2 * half);
    }
    codes.scale = nibble_scales(b + 74, b);
    codes.minimum = mul(codes.scale, set1(kSignedMiddle));
    return codes;
  }
};

inline __m512i look_up_words(const std::uint32_t* table, __m512i entries) {
  return _mm512_i32gather_epi32(entries, table, 4);
}

template <>
struct Loader<GgufType::IQ3_XXS> {
  static Codes load(const std::uint8_t* b, std::int64_t) {
    const __m512i shifts = four_times(0, 7, 14, 21);
    Codes codes;
    LOWLAT_UNROLL
    for (int half = 0; half < 2; ++half) {
      const __m512i values[2] = {look_up_words(kIq3XxsWords.data(), bytes_to_lanes(b + 2 + 32 * half)),
                                 look_up_words(kIq3XxsWords.data(), bytes_to_lanes(b + 18 + 32 * half))};
      const __m512i signs = each_four_times(sixteen(b + 66 + 16 * half));
      put_signed_codes(values, sign_bytes(_mm512_srlv_epi32(signs, shifts)), codes.code + 2 * half);
    }
    codes.scale = top_scales(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + 66)), b, 0.5f);
    codes.minimum = mul(codes.scale, set1(kSignedMiddle));
    return codes;
  }
};

template <>
struct Loader<GgufType::IQ3_S> {
  static Codes load(const std::uint8_t* b, std::int64_t) {
    Codes codes;
    LOWLAT_UNROLL
    for (int k = 0; k < 4; ++k) {
      const __m512i low = bytes_to_lanes(b + 2 + 16 * k);
      const auto high = static_cast<__mmask16>(short_at(b + 66 + 2 * k));
      const __m512i entries = _mm512_mask_add_epi32(low, high, low, _mm512_set1_epi32(256));
      codes.code[k] = signed_codes(look_up_words(kIq3SWords.data(), entries), quad_at(b + 74 + 8 * k));
    }
    const __m256i nibbles = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(word_at(b + 106))),
                                              _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    const __m256 scales = _mm256_cvtepi32_ps(_mm256_and_si256(nibbles, _mm256_set1_epi32(15)));
    codes.scale = mul(fma(wide_to_lanes(scales), set1(2.0f), set1(1.0f)), all_halves(b));
    codes.minimum = mul(codes.scale, set1(kSignedMiddle));
    return codes;
  }
};

// Codes of IQ1_S are entries in eighths + 8; a shift of an eighth up or down is in the minimum. In IQ1_M it is in the
// codes, which are + 9.
template <>
struct Loader<GgufType::IQ1_S> {
  static Codes load(const std::uint8_t* b, std::int64_t) {
    const __m512i shifts = four_times(0, 3, 6, 9), eight = all_bytes(8);
    Codes codes;
    LOWLAT_UNROLL
    for (int half = 0; half < 2; ++half) {
      const __m128i bits = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(b + 34 + 8 * half)));
      __m512i values[2];
      look_up(kIq1Words.data(),
              _mm512_or_si512(bytes_to_lanes(b + 2 + 16 * half), high_part(each_four_times(bits), shifts, 7)), values);
      codes.code[2 * half] = _mm512_add_epi8(values[0], eight);
      codes.code[2 * half + 1] = _mm512_add_epi8(values[1], eight);
    }
    const __m256i words = _mm256_cvtepu16_epi32(sixteen(b + 34));
    const __m256i steps = _mm256_and_si256(_mm256_srli_epi32(words, 12), _mm256_set1_epi32(7));
    const __m256i middles = _mm256_add_epi32(_mm256_slli_epi32(_mm256_srli_epi32(words, 15), 1), _mm256_set1_epi32(7));
    const F scales = fma(wide_to_lanes(_mm256_cvtepi32_ps(steps)), set1(2.0f), set1(1.0f));
    codes.scale = mul(scales, mul(all_halves(b), set1(0.125f)));
    codes.minimum = mul(codes.scale, wide_to_lanes(_mm256_cvtepi32_ps(middles)));
    return codes;
  }
};

template <>
struct Loader<GgufType::IQ1_M> {
  static Codes load(const std::uint8_t* b, std::int64_t) {
    const __m512i shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    Codes codes;
    LOWLAT_UNROLL
    for (int half = 0; half < 2; ++half) {
      const __m512i bits = _mm512_permutexvar_epi32(
          _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1),
          _mm512_castsi128_si512(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(b + 32 + 8 * half))));
      __m512i values[2];
      look_up(kIq1Words.data(), _mm512_or_si512(bytes_to_lanes(b + 16 * half), high_part(bits, shifts, 7)), values);
      const __mmask16 down = _mm512_test_epi32_mask(_mm512_srlv_epi32(bits, shifts), _mm512_set1_epi32(8));
      for (int k = 0; k < 2; ++k) {
        const auto own = static_cast<__mmask8>(down >> 8 * k);
        codes.code[2 * half + k] =
            _mm512_add_epi8(values[k], _mm512_mask_mov_epi64(all_bytes(10), own, all_bytes(8)));
      }
    }
    codes.scale = scales(b + 48);
    codes.minimum = mul(codes.scale, set1(9.0f));
    return codes;
  }

 private:
  static F scales(const std::uint8_t* b) {
    const std::uint64_t words = quad_at(b);
    const auto d = static_cast<std::uint32_t>((words >> 12 & 15) | (words >> 24 & 240) | (words >> 36 & 3840) |
                                              (words >> 48 & 61440));
    const __m512i all = each_four_times(_mm_cvtepu16_epi32(_mm_cvtsi64_si128(static_cast<long long>(words))));
    const __m512i steps = _mm512_and_si512(_mm512_srlv_epi32(all, four_times(0, 3, 6, 9)), _mm512_set1_epi32(7));
    const F odd = fma({_mm512_cvtepi32_ps(steps)}, set1(2.0f), set1(1.0f));
    const F unit = {_mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(static_cast<int>(d))))};
    return to_lanes(mul(odd, mul(unit, set1(0.125f))));
  }
};

// --- fp4 and ternary ------------------------------------------------------------------------------------------------------

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

// --- weights --------------------------------------------------------------------------------------------------------------

// Calls body(column, weights) for each 16 columns of a row. Scale times code and the minimum are exact in fp32, and so
// is their difference in types without minima: the weights are those of each_sixteen() where scales are finite.
template <GgufType type, class Body>
inline void each_finite_sixteen(const Matrix& w, std::int64_t row, Body&& body) {
  SpanBytes<type> bytes;
  for (std::int64_t first = 0; first < w.columns; first += kSpan) {
    alignas(64) std::uint8_t code[kSpan];
    alignas(64) float scale[kScales], minimum[kScales];
    const std::int64_t columns = least(kSpan, w.columns - first);
    const Codes codes = Loader<type>::load(bytes.of(w, row, first / kSpan), columns);
    for (int k = 0; k < 4; ++k) _mm512_store_si512(code + 64 * k, codes.code[k]);
    store(scale, codes.scale);
    store(minimum, codes.minimum);
    for (int g = 0; 16 * g < columns; ++g) {
      const int place = g % 4 * 4 + g / 4;
      const F values = floats_of_bytes(_mm_load_si128(reinterpret_cast<const __m128i*>(code + 16 * g)));
      if constexpr (kMinimumInSteps<type>) {
        body(first + 16 * g, mul(sub(values, set1(minimum[place])), set1(scale[place])));
      } else {
        body(first + 16 * g, F{_mm512_fmsub_ps(values.v, _mm512_set1_ps(scale[place]), _mm512_set1_ps(minimum[place]))});
      }
    }
  }
}

}  // namespace lowlat::LOWLAT_ISA::gguf
