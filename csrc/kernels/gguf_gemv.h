// GEMV with weights in GGUF blocks: each row is read in file order, its integers multiply 15-bit activations exactly, and
// scales and minima are applied in fp32.
//
// The chain of operations of an output depends on its row of W and its row of x alone: 16 accumulators, one step per span
// of 256 columns, summed at the end.
#pragma once

#include "gemv.h"
#include "gguf_activations.h"
#if defined(LOWLAT_AVX512)
#include "gguf_tiles.h"
#endif

namespace lowlat::LOWLAT_ISA::gguf {

constexpr std::int64_t kMostTokens = 8;  // activation rows per pass over a tile

#if defined(LOWLAT_AVX512)

template <GgufType type>
using Weights = std::conditional_t<kByEntries<type>, EntryCodes, Codes>;
template <GgufType type>
using SpanOf = std::conditional_t<kByEntries<type>, EntryActivations, SpanActivations>;

template <GgufType type>
inline Weights<type> load_weights(const std::uint8_t* at, std::int64_t columns) {
  if constexpr (kByEntries<type>) {
    return EntryLoader<type>::load(at);
  } else {
    return Loader<type>::load(at, columns);
  }
}

// The sums of the lanes of four vectors, four at a time: lane 4 j + k is that of quarter j of vector k.
inline __m512i sums_of_fours(const __m512i (&v)[4]) {
  const auto halve = [](__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  };
  const __m512i ab = halve(v[0], v[1]), cd = halve(v[2], v[3]);
  return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

// sum + weights . x over a span.
template <GgufType type>
inline F add_products(F sum, const Codes& w, const SpanActivations& x) {
  __m512i products[4];
  LOWLAT_UNROLL
  for (int k = 0; k < 4; ++k) {
    const __m512i high = _mm512_load_si512(x.high + 64 * k), low = _mm512_load_si512(x.low + 64 * k);
    const __m512i above = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w.code[k], high);
    products[k] = _mm512_dpbusd_epi32(_mm512_slli_epi32(above, 7), w.code[k], low);
  }
  const F integers = {_mm512_cvtepi32_ps(sums_of_fours(products))};
  const F products_of_codes = mul(integers, load(x.scale));
  if constexpr (kMinimumInSteps<type>) {
    return fma({_mm512_fnmadd_ps(w.minimum.v, load(x.sum).v, products_of_codes.v)}, w.scale, sum);
  }
  sum = fma(products_of_codes, w.scale, sum);
  return {_mm512_fnmadd_ps(w.minimum.v, load(x.sum).v, sum.v)};
}

// codes [first, last) . x from `start`: 128 above + low
inline F entry_products(const EntryCodes& w, const EntryActivations& x, int first, int last, __m512i start) {
  LOWLAT_UNROLL
  for (int e = first; e < last; ++e) start = _mm512_dpbusd_epi32(start, w.code[e], pairs(x.high + 64 * e).v);
  start = _mm512_slli_epi32(start, 7);
  LOWLAT_UNROLL
  for (int e = first; e < last; ++e) start = _mm512_dpbusd_epi32(start, w.code[e], pairs(x.low + 64 * e).v);
  return mul({_mm512_cvtepi32_ps(start)}, load(x.scale));
}

template <GgufType type>
inline F add_products(F sum, const EntryCodes& w, const EntryActivations& x) {
  const __m512i starts[2] = {pairs(x.start[0]).v, pairs(x.start[1]).v};
  if constexpr (EntryLoader<type>::kIsWide) {
    return fma(entry_products(w, x, 0, 4, _mm512_add_epi32(starts[0], starts[1])), w.scale[0], sum);
  }
  sum = fma(entry_products(w, x, 0, 2, starts[0]), w.scale[0], sum);
  return fma(entry_products(w, x, 2, 4, starts[1]), w.scale[1], sum);
}

#else

template <GgufType type>
using SpanOf = SpanActivations;

template <GgufType type>
struct Weights {
  Span span;
};

template <GgufType type>
inline Weights<type> load_weights(const std::uint8_t* at, std::int64_t columns) {
  Weights<type> weights;
  decode_span<type>(at, columns, weights.span);
  return weights;
}

template <GgufType type>
inline F add_products(F sum, const Weights<type>& w, const SpanActivations& x) {
  alignas(64) float scales[kScales];
  store(scales, mul(load(w.span.scale), load(x.scale)));
  for (int g = 0; g < kScales; g += 2) {
    sum = fma(dot_integers(w.span.value + 16 * g, x.value + 16 * g), set1_halves(scales[g], scales[g + 1]), sum);
  }
  if constexpr (Decoder<type>::kHasMinimum) sum = sub(sum, mul(load(w.span.minimum), load(x.sum)));
  return sum;
}

#endif

// lanes[t][r] += rows of a tile times `tokens` rows of x, `apart` spans from each other; for a single row the sums stay
// in a register. Prefetches the same place of tile `next`.
template <GgufType type, bool is_one>
inline void multiply_tile(const Matrix& w, std::int64_t tile, NextTile next, const SpanOf<type>* x, std::int64_t apart,
                          std::int64_t tokens, Lanes* lanes) {
  const std::int64_t first = tile * kTile, rows = least(kTile, w.rows - first), spans = num_spans(w.columns);
  const std::int64_t ahead = distance_ahead(w, tile, next);
  SpanBytes<type> bytes;
  for (std::int64_t r = 0; r < rows; ++r) {
    F sum = zero();
    for (std::int64_t s = 0; s < spans; ++s) {
      const std::uint8_t* at = bytes.of(w, first + r, s);
      for (std::int64_t line = 0; ahead != 0 && line < span_bytes<type>(); line += 64) prefetch_far(at + ahead + line);
      const auto weights = load_weights<type>(at, least(kSpan, w.columns - s * kSpan));
      if constexpr (is_one) {
        sum = add_products<type>(sum, weights, x[s]);
      } else {
        for (std::int64_t t = 0; t < tokens; ++t) {
          float* own = lanes[t][r];
          store(own, add_products<type>(s == 0 ? zero() : load(own), weights, x[t * apart + s]));
        }
      }
    }
    if constexpr (is_one) store(lanes[0][r], sum);
  }
}

// Tiles [first, last) of y = x W^T.
inline void gemv(const Matrix& w, std::int64_t first, std::int64_t last, NextTile next, const Activations& x, float* out,
                 std::int64_t out_stride) {
  const std::int64_t apart = num_spans(w.columns), step = even_block(x.rows, kMostTokens);
  alignas(64) Lanes lanes[kMostTokens] = {};
  for (std::int64_t tile = first; tile < last; ++tile, out += kTile) {
    // By strips: the next tile would be too near in matrices of few columns.
    NextTile then = {next.w, next.tile + tile - first};
    if (next.w == nullptr && tile + 1 < last) then = {&w, tile + 1};
#if defined(LOWLAT_AVX512)
    if (w.is_interleaved) {
      multiply_interleaved_rows(w, tile, then, x, out, out_stride);
      continue;
    }
#endif
    for (std::int64_t row = 0; row < x.rows; row += step) {
      const std::int64_t tokens = least(step, x.rows - row);
      with_gguf_type(w.type, [&]<GgufType type>() {
        const SpanOf<type>* spans = find_activations<SpanOf<type>>(x, w.columns) + row * apart;
        if (tokens == 1) return multiply_tile<type, true>(w, tile, row == 0 ? then : NextTile{}, spans, apart, 1, lanes);
        multiply_tile<type, false>(w, tile, row == 0 ? then : NextTile{}, spans, apart, tokens, lanes);
      });
      for (std::int64_t t = 0; t < tokens; ++t) store(out + (row + t) * out_stride, sums_of_lanes(lanes[t]));
    }
  }
}

}  // namespace lowlat::LOWLAT_ISA::gguf
