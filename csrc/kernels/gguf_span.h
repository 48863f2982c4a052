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

// The bytes of a span of a row: in place, or gathered from an interleaved matrix.
template <GgufType type>
class SpanBytes {
 public:
  const std::uint8_t* of(const Matrix& w, std::int64_t row, std::int64_t span) {
    if (w.is_interleaved) return gather(w, row, span);
    return static_cast<const std::uint8_t*>(w.data) + row * w.stride + span * span_bytes<type>();
  }

 private:
  static constexpr std::int64_t kBlock = find_gguf_type(static_cast<std::int64_t>(type))->bytes;

  // Not inline: it would slow down loops over rows in file order.
  [[gnu::noinline]] const std::uint8_t* gather(const Matrix& w, std::int64_t row, std::int64_t span) {
    const std::int64_t bytes = least(span_bytes<type>(), w.stride - span * span_bytes<type>());
    const std::uint8_t* tile = static_cast<const std::uint8_t*>(w.data) + row / kTile * kTile * w.stride +
                               kTile * span * span_bytes<type>();
    std::uint8_t* to = gathered_;
    for (const std::uint8_t* end = to + bytes; to < end; to += kBlock, tile += kTile * kBlock) {
      each_gguf_element(type, [&](std::int64_t offset, std::int64_t size) {
        std::memcpy(to + offset, tile + kTile * offset + row % kTile * size, size);
      });
    }
    return gathered_;
  }

  alignas(64) std::uint8_t gathered_[span_bytes<type>() + 64];
};

// Interleaves a tile of rows.
template <GgufType type>
inline void interleave_tile_of(const Matrix& rows, std::int64_t tile, std::uint8_t* to) {
  constexpr std::int64_t kBlock = find_gguf_type(static_cast<std::int64_t>(type))->bytes;
  constexpr std::int64_t kBlockColumns = find_gguf_type(static_cast<std::int64_t>(type))->columns;
  const std::int64_t bytes = rows.columns / kBlockColumns * kBlock;
  to += tile * kTile * bytes;
  for (std::int64_t r = 0; r < kTile; ++r) {
    const std::int64_t row = tile * kTile + r;
    const std::uint8_t* from = static_cast<const std::uint8_t*>(rows.data) + row * rows.stride;
    for (std::int64_t block = 0; block < bytes; block += kBlock) {
      each_gguf_element(type, [&](std::int64_t offset, std::int64_t size) {
        std::uint8_t* place = to + kTile * (block + offset) + r * size;
        if (row < rows.rows) {
          std::memcpy(place, from + block + offset, size);
        } else {
          std::memset(place, 0, size);
        }
      });
    }
  }
}

inline void interleave_tile(const Matrix& rows, std::int64_t tile, std::uint8_t* to) {
  with_gguf_type(rows.type, [&]<GgufType type>() { interleave_tile_of<type>(rows, tile, to); });
}

// Calls body(column, group, weights) for each 16 columns of a row.
template <GgufType type, class Body>
inline void each_sixteen(const Matrix& w, std::int64_t row, Body&& body) {
  SpanBytes<type> bytes;
  for (std::int64_t first = 0; first < w.columns; first += kSpan) {
    Span span;
    const std::int64_t columns = least(kSpan, w.columns - first);
    decode_span<type>(bytes.of(w, row, first / kSpan), columns, span);
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
