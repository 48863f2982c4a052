// Rows in GGUF blocks, decoded in spans of 256 columns: integers and scales, exact weights.
#pragma once

#include "../matrix.h"
#include "gguf_decode_iq.h"

namespace lowlat::LOWLAT_ISA::gguf {

// weight c = scale[c / 16] * value[c] - minimum[c / 16]; zeros beyond the row.
struct Span {
  alignas(64) std::int8_t value[kSpan];
  alignas(64) float scale[kScales];
  alignas(64) float minimum[kScales];  // of types that have minima
};

// Columns [0, columns) of the span at `at`.
template <GgufType type>
inline void decode_span(const std::uint8_t* at, std::int64_t columns, Span& span) {
  constexpr const GgufTypeInfo& info = *find_gguf_type(static_cast<std::int64_t>(type));
  if (columns < kSpan) span = {};
  for (std::int64_t first = 0; first < columns; first += info.columns, at += info.bytes) {
    Decoder<type>::decode(at, {span.value + first, span.scale + first / 16, span.minimum + first / 16});
  }
}

// Bytes of a span of 256 columns.
template <GgufType type>
constexpr std::int64_t span_bytes() {
  constexpr const GgufTypeInfo& info = *find_gguf_type(static_cast<std::int64_t>(type));
  return kSpan / info.columns * info.bytes;
}

// 16 weights of a span, exact.
template <GgufType type>
inline F weights_of(const Span& span, int group) {
  const F product = mul(load_int8(span.value + 16 * group), set1(span.scale[group]));
  return Decoder<type>::kHasMinimum ? sub(product, set1(span.minimum[group])) : product;
}

inline const std::uint8_t* block_row(const Matrix& w, std::int64_t row) {
  return static_cast<const std::uint8_t*>(w.data) + row * w.stride;
}

// Calls body(column, group, weights) for each 16 columns of a row.
template <GgufType type, class Body>
inline void each_sixteen(const Matrix& w, std::int64_t row, Body&& body) {
  const std::uint8_t* at = block_row(w, row);
  for (std::int64_t first = 0; first < w.columns; first += kSpan, at += span_bytes<type>()) {
    Span span;
    const std::int64_t columns = least(kSpan, w.columns - first);
    decode_span<type>(at, columns, span);
    for (int g = 0; 16 * g < columns; ++g) body(first + 16 * g, weights_of<type>(span, g));
  }
}

#if !defined(LOWLAT_AVX512)

// The same where weights are finite; see gguf_codes_iq.h.
template <GgufType type, class Body>
inline void each_finite_sixteen(const Matrix& w, std::int64_t row, Body&& body) {
  each_sixteen<type>(w, row, body);
}

#endif

// A row of weights in fp32.
inline void dequantize_row(const Matrix& w, std::int64_t row, float* out) {
  with_gguf_type(w.type, [&]<GgufType type>() {
    each_sixteen<type>(w, row, [&](std::int64_t column, F weights) { store(out + column, weights); });
  });
}

// A row of weights rounded to bf16.
inline void dequantize_row(const Matrix& w, std::int64_t row, bf16* out) {
  with_gguf_type(w.type, [&]<GgufType type>() {
    each_sixteen<type>(w, row, [&](std::int64_t column, F weights) { store_bf16(out + column, weights); });
  });
}

}  // namespace lowlat::LOWLAT_ISA::gguf
