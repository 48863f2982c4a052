// GEMV with interleaved GGUF blocks on AVX-512: integer dot products of 16 rows at once with broadcast activations.
#pragma once

#include "gguf_activations.h"
#include "split_activations.h"

namespace lowlat::LOWLAT_ISA::gguf {

constexpr int kTileTokens = 4;

// One tile and T rows of x, `apart` spans from each other.
template <GgufType type, int T>
inline void multiply_interleaved(const Matrix& w, std::int64_t tile, const SpanActivations* x, std::int64_t apart,
                                 float* out, std::int64_t out_stride) {
  using Decoder = TileDecoder<type>;
  constexpr const GgufTypeInfo& info = *find_gguf_type(static_cast<std::int64_t>(type));
  constexpr std::int64_t kBytes = kTile * info.bytes;
  const std::uint8_t* at = static_cast<const std::uint8_t*>(w.data) + tile * kTile * w.stride;
  F total[T];
  LOWLAT_UNROLL
  for (int t = 0; t < T; ++t) total[t] = zero();
  for (std::int64_t column = 0; column < w.columns; column += info.columns, at += kBytes) {
    // May point beyond the matrix: prefetching unmapped memory does nothing.
    for (std::int64_t line = 0; line < kBytes; line += 64) prefetch_far(at + most(kBytes, 8192) + line);
    Decoder decoder(at);
    for (int g = 0; g < Decoder::kGroups; ++g) {
      decoder.start(g);
      const std::int64_t first = column + g * Decoder::kGroup;
      const auto in_span = static_cast<int>(first % kSpan);
      const SpanActivations* span = x + first / kSpan;
      SplitSums sums[T];
      LOWLAT_UNROLL
      for (int i = 0; i < Decoder::kGroup / 4; ++i) {
        const P code = {decoder.word(i)};
        LOWLAT_UNROLL
        for (int t = 0; t < T; ++t) {
          const SpanActivations& own = span[t * apart];
          sums[t].high = dot_bytes(sums[t].high, code, set1_pair(word_at(own.high + in_span + 4 * i)));
          sums[t].low = dot_bytes(sums[t].low, code, set1_pair(word_at(own.low + in_span + 4 * i)));
        }
      }
      const F offset = Decoder::kHasMinimum ? decoder.minimum : mul(decoder.scale, set1(Decoder::kZero));
      LOWLAT_UNROLL
      for (int t = 0; t < T; ++t) {
        const SpanActivations& own = span[t * apart];
        const int place = place_of_group(in_span / 16);
        float along = own.sum[place];
        if constexpr (Decoder::kGroup == 32) along += own.sum[place_of_group(in_span / 16 + 1)];
        const F integers = integers_to_float(sums[t].total());
        if constexpr (kMinimumInSteps<type>) {
          const F products = mul(integers, set1(own.scale[place]));
          const F zero_point = set1(Decoder::kZero);
          total[t] = fma({_mm512_fnmadd_ps(zero_point.v, _mm512_set1_ps(along), products.v)}, decoder.scale, total[t]);
        } else {
          total[t] = fma(integers, mul(decoder.scale, set1(own.scale[place])), total[t]);
          total[t] = {_mm512_fnmadd_ps(offset.v, _mm512_set1_ps(along), total[t].v)};
        }
      }
    }
  }
  LOWLAT_UNROLL
  for (int t = 0; t < T; ++t) store(out + t * out_stride, total[t]);
}

// All rows of x.
inline void multiply_interleaved_rows(const Matrix& w, std::int64_t tile, const SpanActivations* x, std::int64_t rows,
                                      float* out, std::int64_t out_stride) {
  const std::int64_t apart = num_spans(w.columns), step = even_block(rows, kTileTokens);
  with_gguf_type(w.type, [&]<GgufType type>() {
    if constexpr (can_interleave(type)) {
      for (std::int64_t row = 0; row < rows; row += step) {
        with_tokens<kTileTokens>(least(step, rows - row), [&]<int T>() {
          multiply_interleaved<type, T>(w, tile, x + row * apart, apart, out + row * out_stride, out_stride);
        });
      }
    }
  });
}

}  // namespace lowlat::LOWLAT_ISA::gguf
