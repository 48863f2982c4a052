// AVX-512 decoders of GGUF's IQ types with codebooks for integer dot products: an entry of 8 columns (or two of 4) is 64
// bits, looked up for eight groups of 32 columns at once, so that sums of groups stay in their lanes.
#pragma once

#include <type_traits>

#include "gguf_codes_fp4.h"

namespace lowlat::LOWLAT_ISA::gguf {

// Code e holds entry e of every group of 32 columns, group g in 64 bits: weight = scale * (code - 128). Lanes 2 g and
// 2 g + 1 of a scale are group g: scale[0] of its first 16 columns, scale[1] of the others.
struct EntryCodes {
  __m512i code[4];
  F scale[2];
};

// With kIsWide, the scales of both halves are equal.
template <GgufType type>
struct EntryLoader;

template <GgufType type>
constexpr bool kByEntries = requires { EntryLoader<type>::kIsWide; };

// A codebook whose bytes are codes.
template <class Words>
constexpr Words as_codes(Words words) {
  for (auto& word : words) word ^= static_cast<std::remove_reference_t<decltype(word)>>(0x8080808080808080u);
  return words;
}

inline constexpr auto kIq2XxsCodes = as_codes(kIq2XxsWords);
inline constexpr auto kIq2XsCodes = as_codes(kIq2XsWords);
inline constexpr auto kIq2SCodes = as_codes(kIq2SWords);
inline constexpr auto kIq1Codes = as_codes(kIq1Words);
inline constexpr auto kIq3XxsCodes = as_codes(kIq3XxsWords);
inline constexpr auto kIq3SCodes = as_codes(kIq3SWords);

// Numbers of 4, 2 or 1 bytes of eight groups.
inline __m512i group_words(const std::uint8_t* p) {
  return _mm512_cvtepu32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __m512i group_shorts(const std::uint8_t* p) { return _mm512_cvtepu16_epi64(sixteen(p)); }
inline __m512i group_bytes(const std::uint8_t* p) {
  return _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}

// Bits of every 64 from bit `from`, as a number times 2^to.
inline __m512i group_field(__m512i groups, int from, std::int64_t mask, int to = 0) {
  const auto by = [](int count) { return _mm512_set1_epi64(count); };
  if (from > to) groups = _mm512_srlv_epi64(groups, by(from - to));
  if (from < to) groups = _mm512_sllv_epi64(groups, by(to - from));
  return _mm512_and_si512(groups, _mm512_set1_epi64(mask << to));
}

// Into zeros: a gather into a register with other contents waits for them.
inline __m512i entries_of(const std::uint64_t* codes, __m512i entries) {
  return _mm512_mask_i64gather_epi64(_mm512_setzero_si512(), 0xff, entries, codes, 8);
}

// Codes with the sign bits of byte `number` of every group.
inline __m512i with_signs(__m512i codes, __m512i signs, int number) {
  const std::int64_t from = 0x0101010101010101 * number, to_last = 0x0808080808080808;
  const __m512i all = _mm512_shuffle_epi8(signs, _mm512_broadcast_i32x4(_mm_set_epi64x(from + to_last, from)));
  const __m512i bits = _mm512_set1_epi64(static_cast<std::int64_t>(0x8040201008040201u));
  const __mmask64 is_negative = _mm512_test_epi8_mask(all, bits);
  return _mm512_mask_sub_epi8(codes, is_negative, _mm512_setzero_si512(), codes);
}

// Sign bits of 8 integers from bytes of 7 bits: the number of negative ones is even.
inline __m512i even_sign_bytes(__m512i sevens) {
  const __m512i nibble = _mm512_ternarylogic_epi32(sevens, _mm512_srli_epi16(sevens, 4), all_bytes(15), 0x28);
  const __m512i odd = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, -128, -128, 0, -128, 0, 0, -128, -128, 0, 0, -128, 0, -128, -128, 0));
  return _mm512_or_si512(sevens, _mm512_shuffle_epi8(odd, nibble));
}

// Four fields of 7 bits of every word, in a byte each.
inline __m512i seven_bit_bytes(__m512i words) {
  const auto choose = [](int mask, __m512i one, __m512i other) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi32(mask), one, other, 0xca);
  };
  const __m512i twos = choose(0x00003fff, words, _mm512_slli_epi32(words, 2));
  return _mm512_and_si512(choose(0x007f007f, twos, _mm512_slli_epi32(twos, 1)), all_bytes(127));
}

// The lower word of every group, for both of its lanes.
inline F both_lanes(__m512i groups) { return {_mm512_cvtepi32_ps(_mm512_shuffle_epi32(groups, _MM_PERM_CCAA))}; }
// d * factor * (0.5 + scale)
inline F offset_scales(__m512i scales, const std::uint8_t* d, float factor) {
  return mul(mul(all_halves(d), set1(factor)), add(both_lanes(scales), set1(0.5f)));
}
// d * factor * (2 scale + 1)
inline F odd_scales(__m512i scales, F d, float factor) {
  return mul(fma(both_lanes(scales), set1(2.0f), set1(1.0f)), mul(d, set1(factor)));
}

template <>
struct EntryLoader<GgufType::IQ2_XXS> {
  static constexpr bool kIsWide = true;
  static EntryCodes load(const std::uint8_t* b) {
    const __m512i groups = pairs(b + 2).v;
    const __m512i signs = even_sign_bytes(seven_bit_bytes(_mm512_srli_epi64(groups, 32)));
    EntryCodes codes;
    LOWLAT_UNROLL
    for (int e = 0; e < 4; ++e) {
      codes.code[e] = with_signs(entries_of(kIq2XxsCodes.data(), group_field(groups, 8 * e, 255)), signs, e);
    }
    codes.scale[0] = codes.scale[1] = offset_scales(_mm512_srli_epi64(groups, 60), b, 0.25f);
    return codes;
  }
};

// Scales of 4 bits for 16 columns each.
inline void load_nibble_scales(const std::uint8_t* nibbles, const std::uint8_t* d, EntryCodes& codes) {
  const __m512i both = group_bytes(nibbles);
  for (int half = 0; half < 2; ++half) codes.scale[half] = offset_scales(group_field(both, 4 * half, 15), d, 0.25f);
}

template <>
struct EntryLoader<GgufType::IQ2_XS> {
  static constexpr bool kIsWide = false;
  static EntryCodes load(const std::uint8_t* b) {
    const __m512i groups = pairs(b + 2).v, signs = even_sign_bytes(_mm512_srli_epi16(groups, 9));
    EntryCodes codes;
    LOWLAT_UNROLL
    for (int e = 0; e < 4; ++e) {
      codes.code[e] = with_signs(entries_of(kIq2XsCodes.data(), group_field(groups, 16 * e, 511)), signs, 2 * e);
    }
    load_nibble_scales(b + 66, b, codes);
    return codes;
  }
};

template <>
struct EntryLoader<GgufType::IQ2_S> {
  static constexpr bool kIsWide = false;
  static EntryCodes load(const std::uint8_t* b) {
    const __m512i low = group_words(b + 2), signs = group_words(b + 34), high = group_bytes(b + 66);
    EntryCodes codes;
    LOWLAT_UNROLL
    for (int e = 0; e < 4; ++e) {
      const __m512i entries = _mm512_or_si512(group_field(low, 8 * e, 255), group_field(high, 2 * e, 3, 8));
      codes.code[e] = with_signs(entries_of(kIq2SCodes.data(), entries), signs, e);
    }
    load_nibble_scales(b + 74, b, codes);
    return codes;
  }
};

// Entries of 4 columns: bytes 2 e and 2 e + 1 of every group, one for each lane.
inline __m512i lane_entries(__m512i groups, int e) {
  const auto from = [e](int lane) { return static_cast<int>(0x80808000u) | (8 * (lane / 2) + 2 * e + lane % 2); };
  return _mm512_shuffle_epi8(groups, _mm512_broadcast_i32x4(_mm_setr_epi32(from(0), from(1), from(2), from(3))));
}
inline __m512i entries_of(const std::uint32_t* codes, __m512i entries) {
  return _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), 0xffff, entries, codes, 4);
}

template <>
struct EntryLoader<GgufType::IQ3_XXS> {
  static constexpr bool kIsWide = true;
  static EntryCodes load(const std::uint8_t* b) {
    const __m512i groups = pairs(b + 2).v, words = group_words(b + 66), signs = even_sign_bytes(seven_bit_bytes(words));
    EntryCodes codes;
    LOWLAT_UNROLL
    for (int e = 0; e < 4; ++e) {
      codes.code[e] = with_signs(entries_of(kIq3XxsCodes.data(), lane_entries(groups, e)), signs, e);
    }
    codes.scale[0] = codes.scale[1] = offset_scales(_mm512_srli_epi64(words, 28), b, 0.5f);
    return codes;
  }
};

template <>
struct EntryLoader<GgufType::IQ3_S> {
  static constexpr bool kIsWide = true;
  static EntryCodes load(const std::uint8_t* b) {
    const __m512i groups = pairs(b + 2).v, signs = group_words(b + 74);
    const __m512i high = _mm512_shuffle_epi32(group_bytes(b + 66), _MM_PERM_CCAA);
    EntryCodes codes;
    LOWLAT_UNROLL
    for (int e = 0; e < 4; ++e) {
      const __m512i low = lane_entries(groups, e);
      const __m512i bits = _mm512_set1_epi64(std::int64_t{1} << 2 * e | std::int64_t{1} << (33 + 2 * e));
      const __mmask16 is_high = _mm512_test_epi32_mask(high, bits);
      const __m512i entries = _mm512_mask_add_epi32(low, is_high, low, _mm512_set1_epi32(256));
      codes.code[e] = with_signs(entries_of(kIq3SCodes.data(), entries), signs, e);
    }
    const __m512i places = _mm512_setr_epi64(0, 4, 8, 12, 16, 20, 24, 28);
    const __m512i nibbles = _mm512_srlv_epi64(_mm512_set1_epi64(word_at(b + 106)), places);
    codes.scale[0] = codes.scale[1] = odd_scales(_mm512_and_si512(nibbles, _mm512_set1_epi64(15)), all_halves(b), 1.0f);
    return codes;
  }
};

// Codes of IQ1 are in eighths, one up or down.
inline __m512i shifted_entries(__m512i entries, __m512i signs, int bit) {
  const __mmask8 is_down = _mm512_test_epi64_mask(signs, _mm512_set1_epi64(std::int64_t{1} << bit));
  return _mm512_add_epi8(entries_of(kIq1Codes.data(), entries), _mm512_mask_mov_epi64(all_bytes(1), is_down, all_bytes(-1)));
}

template <>
struct EntryLoader<GgufType::IQ1_S> {
  static constexpr bool kIsWide = true;
  static EntryCodes load(const std::uint8_t* b) {
    const __m512i low = group_words(b + 2), high = group_shorts(b + 34);
    EntryCodes codes;
    LOWLAT_UNROLL
    for (int e = 0; e < 4; ++e) {
      const __m512i entries = _mm512_or_si512(group_field(low, 8 * e, 255), group_field(high, 3 * e, 7, 8));
      codes.code[e] = shifted_entries(entries, high, 15);
    }
    codes.scale[0] = codes.scale[1] = odd_scales(group_field(high, 12, 7), all_halves(b), 0.125f);
    return codes;
  }
};

template <>
struct EntryLoader<GgufType::IQ1_M> {
  static constexpr bool kIsWide = false;
  static EntryCodes load(const std::uint8_t* b) {
    const __m512i low = group_words(b), high = group_shorts(b + 32);
    EntryCodes codes;
    LOWLAT_UNROLL
    for (int e = 0; e < 4; ++e) {
      const __m512i entries = _mm512_or_si512(group_field(low, 8 * e, 255), group_field(high, 4 * e, 7, 8));
      codes.code[e] = shifted_entries(entries, high, 4 * e + 3);
    }
    std::uint64_t words;
    std::memcpy(&words, b + 48, sizeof words);
    const auto bits = static_cast<int>((words >> 12 & 15) | (words >> 24 & 240) | (words >> 36 & 3840) |
                                       (words >> 48 & 61440));
    const F d = {_mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)))};
    for (int half = 0; half < 2; ++half) {
      const __m512i places = _mm512_setr_epi64(0, 6, 16, 22, 32, 38, 48, 54);
      const __m512i steps = _mm512_srlv_epi64(_mm512_set1_epi64(static_cast<std::int64_t>(words)),
                                              _mm512_add_epi64(places, _mm512_set1_epi64(3 * half)));
      codes.scale[half] = odd_scales(_mm512_and_si512(steps, _mm512_set1_epi64(7)), d, 0.125f);
    }
    return codes;
  }
};

// --- weights --------------------------------------------------------------------------------------------------------------

// Calls body(group, weights) for each 16 of `columns` columns of a span.
template <GgufType type, class Body>
inline void each_sixteen_of_span(const std::uint8_t* at, std::int64_t columns, Body&& body) {
  alignas(64) std::uint8_t code[kSpan];
  if constexpr (kByEntries<type>) {
    alignas(64) float scale[2][16];
    const EntryCodes codes = EntryLoader<type>::load(at);
    for (int e = 0; e < 4; ++e) _mm512_store_si512(code + 64 * e, codes.code[e]);
    for (int half = 0; half < 2; ++half) store(scale[half], codes.scale[half]);
    for (int g = 0; g < kScales; ++g) {
      const std::uint8_t* own = code + 128 * (g % 2) + 8 * (g / 2);
      const __m128i first = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(own));
      const __m128i last = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(own + 64));
      const F values = floats_of_bytes(_mm_unpacklo_epi64(first, last));
      body(g, mul(sub(values, set1(128.0f)), set1(scale[g % 2][g / 2 * 2])));
    }
  } else {
    alignas(64) float scale[kScales], minimum[kScales];
    const Codes codes = Loader<type>::load(at, columns);
    for (int k = 0; k < 4; ++k) _mm512_store_si512(code + 64 * k, codes.code[k]);
    store(scale, codes.scale);
    store(minimum, codes.minimum);
    for (int g = 0; 16 * g < columns; ++g) {
      const int place = g % 4 * 4 + g / 4;
      const F values = floats_of_bytes(_mm_load_si128(reinterpret_cast<const __m128i*>(code + 16 * g)));
      if constexpr (kMinimumInSteps<type>) {
        body(g, mul(sub(values, set1(minimum[place])), set1(scale[place])));
      } else {
        body(g, F{_mm512_fmsub_ps(values.v, _mm512_set1_ps(scale[place]), _mm512_set1_ps(minimum[place]))});
      }
    }
  }
}

// Calls body(column, weights) for each 16 columns of a row. Scale times code and the minimum are exact in fp32, and so
// is their difference in types without minima: the weights are those of each_sixteen() where scales are finite.
template <GgufType type, class Body>
inline void each_finite_sixteen(const Matrix& w, std::int64_t row, Body&& body) {
  SpanBytes<type> bytes;
  for (std::int64_t first = 0; first < w.columns; first += kSpan) {
    each_sixteen_of_span<type>(bytes.of(w, row, first / kSpan), least(kSpan, w.columns - first),
                               [&](int group, F weights) { body(first + 16 * group, weights); });
  }
}

}  // namespace lowlat::LOWLAT_ISA::gguf
