// GEMV with interleaved GGUF blocks on AVX-512: integer dot products of 16 rows at once with broadcast activations.
#pragma once

#include "gguf_activations.h"
#include "split_activations.h"

namespace lowlat::LOWLAT_ISA::gguf {

constexpr int kTileTokens = 4;

// Where the sums of a block's groups start, so that code 0 stands for -kZero.
template <class Decoder>
inline void store_starts(const SpanActivations& x, int in_span, std::int32_t* starts) {
  const std::int32_t* totals = (Decoder::kGroup == 16 ? x.total : x.wide_total) + in_span / Decoder::kGroup;
  for (int g = 0; g < Decoder::kParts * Decoder::kGroups; ++g) starts[g] = -Decoder::kZero * totals[g];
}

// Two groups at once, or the even and odd words of one: twice as many chains of sums.
template <class Decoder>
constexpr int kGroupsAtOnce = Decoder::kGroups > 1 ? 2 : 1;

// sums[k][t] of group g + k * kApart, or of words k of every two, and row t of x.
template <class Decoder, int T>
LOWLAT_INLINE inline void add_groups(Decoder& decoder, int g, int in_span, const SpanActivations* x,
                                     std::int64_t apart, SplitSums (&sums)[2][T]) {
  constexpr int kAtOnce = kGroupsAtOnce<Decoder>;
  if constexpr (requires { decoder.load_group(g); }) {
    LOWLAT_UNROLL
    for (int k = 0; k < kAtOnce; ++k) decoder.load_group(g + k * Decoder::kApart);
  }
  LOWLAT_UNROLL
  for (int i = 0; i < kAtOnce * Decoder::kGroup / 4; ++i) {
    const int group = g + i % kAtOnce * Decoder::kApart, word = i / kAtOnce;
    const int at = in_span + group * Decoder::kGroup + 4 * word;
    P code;
    if constexpr (kHasRawWords<Decoder>) {
      code = {decoder.raw_word(group, word)};
    } else {
      code = {decoder.word(group, word)};
    }
    LOWLAT_UNROLL
    for (int t = 0; t < T; ++t) {
      const SpanActivations& own = x[t * apart];
      SplitSums& to = sums[i % 2][t];
      to.high = dot_bytes(to.high, code, set1_pair(word_at(own.high + at)));
      to.low = dot_bytes(to.low, code, set1_pair(word_at(own.low + at)));
    }
  }
}

// Bytes that a part of a block prefetches, some with every two groups: at once, they would fill all line buffers.
struct PrefetchedBytes {
  const std::uint8_t* at;
  std::int64_t bytes;

  LOWLAT_INLINE void prefetch_share(int share, int shares) const {
    const std::int64_t first = bytes * share / shares / 64, last = bytes * (share + 1) / shares / 64;
    for (std::int64_t line = first; line < last; ++line) prefetch_far(at + 64 * line);
  }
};

// total[t] += the groups of a part of a block times row t of x; starts of another row are kScales further on.
template <int T, class Decoder>
LOWLAT_INLINE inline void add_part(Decoder& decoder, int in_span, const SpanActivations* x, std::int64_t apart,
                                   const std::int32_t* starts, PrefetchedBytes ahead, F (&total)[T]) {
  constexpr int kAtOnce = kGroupsAtOnce<Decoder>, kSteps = Decoder::kGroups / kAtOnce;
  const int first_place = place_of_group(in_span / 16), first_wide = in_span / 32;
  LOWLAT_UNROLL
  for (int two = 0; two < kSteps; ++two) {
    ahead.prefetch_share(two, kSteps);
    const int g = two / Decoder::kApart * 2 * Decoder::kApart + two % Decoder::kApart;
    SplitSums sums[2][T];
    if constexpr (Decoder::kZero != 0) {
      LOWLAT_UNROLL
      for (int k = 0; k < kAtOnce; ++k) {
        LOWLAT_UNROLL
        for (int t = 0; t < T; ++t) sums[k][t].low = set1_pair(word_at(starts + t * kScales + g + k * Decoder::kApart));
      }
    }
    add_groups<Decoder, T>(decoder, g, in_span, x, apart, sums);
    LOWLAT_UNROLL
    for (int k = 0; k < kAtOnce; ++k) {
      const int group = g + k * Decoder::kApart, place = first_place + place_of_group(group * Decoder::kGroup / 16);
      F scale;
      if constexpr (kHasRawWords<Decoder>) {
        scale = decoder.raw_scale(group);
      } else {
        scale = decoder.scale(group);
      }
      LOWLAT_UNROLL
      for (int t = 0; t < T; ++t) {
        const SpanActivations& own = x[t * apart];
        P integers = sums[k][t].total();
        if constexpr (kAtOnce == 1) integers = {_mm512_add_epi32(integers.v, sums[1][t].total().v)};
        // In this order: scales of MXFP4 reach 2^127.
        total[t] = fma(mul(integers_to_float(integers), set1(own.scale[place])), scale, total[t]);
        if constexpr (Decoder::kHasMinimum) {
          const float along = Decoder::kGroup == 32 ? own.wide_sum[first_wide + group] : own.sum[place];
          total[t] = {_mm512_fnmadd_ps(decoder.minimum(group).v, _mm512_set1_ps(along), total[t].v)};
        }
      }
    }
  }
}

// One tile and T rows of x, `apart` spans from each other. Prefetches the same place of tile `next`.
template <GgufType type, int T>
inline void multiply_interleaved(const Matrix& w, std::int64_t tile, NextTile next, const SpanActivations* x,
                                 std::int64_t apart, float* out, std::int64_t out_stride) {
  using Decoder = TileDecoder<type>;
  constexpr const GgufTypeInfo& info = *find_gguf_type(static_cast<std::int64_t>(type));
  constexpr std::int64_t kBytes = kTile * info.bytes;
  const std::uint8_t* at = static_cast<const std::uint8_t*>(w.data) + tile * kTile * w.stride;
  const std::int64_t distance = distance_ahead(w, tile, next), bytes = distance == 0 ? 0 : kBytes / Decoder::kParts;
  F total[T];
  LOWLAT_UNROLL
  for (int t = 0; t < T; ++t) total[t] = zero();
  for (std::int64_t column = 0; column < w.columns; column += info.columns, at += kBytes) {
    const PrefetchedBytes ahead = {at + distance, bytes};
    Decoder decoder(at);
    const auto in_span = info.columns == kSpan ? 0 : static_cast<int>(column % kSpan);
    const SpanActivations* span = x + column / kSpan;
    alignas(64) std::int32_t starts[T][kScales];
    for (int t = 0; t < T; ++t) store_starts<Decoder>(span[t * apart], in_span, starts[t]);
    if constexpr (Decoder::kParts == 1) {
      add_part<T>(decoder, in_span, span, apart, starts[0], ahead, total);
    } else {
      for (decoder.part = 0; decoder.part < Decoder::kParts; ++decoder.part) {
        const int first = decoder.part * Decoder::kGroups;
        const PrefetchedBytes own = {ahead.at + decoder.part * ahead.bytes, ahead.bytes};
        add_part<T>(decoder, first * Decoder::kGroup, span, apart, starts[0] + first, own, total);
      }
    }
  }
  LOWLAT_UNROLL
  for (int t = 0; t < T; ++t) store(out + t * out_stride, total[t]);
}

// All rows of x.
inline void multiply_interleaved_rows(const Matrix& w, std::int64_t tile, NextTile next, const Activations& all, float* out,
                                      std::int64_t out_stride) {
  const std::int64_t rows = all.rows, apart = num_spans(w.columns), step = even_block(rows, kTileTokens);
  with_gguf_type(w.type, [&]<GgufType type>() {
    if constexpr (can_interleave(type)) {
      const SpanActivations* x = kHasWordsOfEights<TileDecoder<type>> ? find_eights(all, w.columns)
                                                                      : find_activations<SpanActivations>(all, w.columns);
      for (std::int64_t row = 0; row < rows; row += step) {
        with_tokens<kTileTokens>(least(step, rows - row), [&]<int T>() {
          multiply_interleaved<type, T>(w, tile, row == 0 ? next : NextTile{}, x + row * apart, apart,
                                        out + row * out_stride, out_stride);
        });
      }
    }
  });
}

}  // namespace lowlat::LOWLAT_ISA::gguf
