// Paged KV cache access: entries of a sequence, page by page, as blocks of keys and values; int8 quantization of
// entries.
#pragma once

#include <initializer_list>

#include "../model.h"
#include "flash_attention.h"
#include "rowwise.h"

namespace lowlat::LOWLAT_ISA {

// `rows` consecutive entries of a sequence as bf16, `stride` elements apart.
struct Rows {
  const bf16* data;
  std::int64_t stride;
};

inline const std::uint8_t* cached_row(const Cache& cache, const std::int32_t* pages, std::int64_t position) {
  const std::int64_t page = pages[position / cache.page_size];
  return cache.data + (page * cache.page_size + position % cache.page_size) * cache.row_bytes;
}

inline std::int64_t padded_to_4(std::int64_t bytes) { return (bytes + 3) / 4 * 4; }

// Channels [first, last) of an entry.
struct Channels {
  std::int64_t first, last;
};

// Dequantizes channels of an int8 entry to bf16 at their places in out [entry_dim], with the other channels of their
// scale groups.
inline void dequantize_row(const Cache& cache, const std::uint8_t* row, Channels wanted, bf16* out) {
  if (wanted.first == wanted.last) return;
  const auto* values = reinterpret_cast<const std::int8_t*>(row);
  const std::uint8_t* scales = row + padded_to_4(cache.quantized);
  const std::int64_t groups = (cache.quantized + 63) / 64;
  for (std::int64_t g = wanted.first / 64; 64 * g < least(wanted.last, cache.quantized); ++g) {
    float scale;
    std::memcpy(&scale, scales + 4 * g, 4);
    const std::int64_t end = least(64 * (g + 1), cache.quantized);
    std::int64_t i = 64 * g;
    for (; i + 32 <= end; i += 32) store_pairs(out + i, pairs_of_int8(values + i, scale));
    for (; i < end; i += 16) store_bf16(out + i, mul(load_int8(values + i, end - i), set1(scale)), end - i);
  }
  const std::int64_t plain = most(0, wanted.last - cache.quantized);
  std::memcpy(out + cache.quantized, scales + 4 * groups, plain * sizeof(bf16));
}

// Stores an entry: native kernel of pack_entries in lowlat/attention/int8_entry.py; out is the entry's place in the
// cache.
inline void store_row(const Cache& cache, const bf16* row, std::int64_t entry_dim, std::uint8_t* out) {
  if (cache.quantized == 0) {
    std::memcpy(out, row, entry_dim * sizeof(bf16));
    return;
  }
  auto* values = reinterpret_cast<std::int8_t*>(out);
  std::uint8_t* scales = out + padded_to_4(cache.quantized);
  const std::int64_t groups = (cache.quantized + 63) / 64;
  for (std::int64_t g = 0; g < groups; ++g) {
    const float scale = round_to_int8(row + 64 * g, least(64, cache.quantized - 64 * g), values + 64 * g);
    std::memcpy(scales + 4 * g, &scale, 4);
  }
  std::memcpy(scales + 4 * groups, row + cache.quantized, (entry_dim - cache.quantized) * sizeof(bf16));
}

// Copies `count` <= 64 entries, number i at row_of(i), with the channels `wanted` to `out` [64, entry_dim rounded up to
// 32].
template <class RowOf>
inline Rows gather_rows(const Cache& cache, RowOf&& row_of, std::int64_t count, std::int64_t entry_dim,
                        std::initializer_list<Channels> wanted, bf16* out) {
  const std::int64_t stride = round_up(entry_dim, 32);
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint8_t* row = row_of(i);
    bf16* to = out + i * stride;
    if (cache.quantized == 0) {
      std::memcpy(to, row, entry_dim * sizeof(bf16));
    } else {
      for (const Channels& channels : wanted) dequantize_row(cache, row, channels, to);
    }
    std::memset(to + entry_dim, 0, (stride - entry_dim) * sizeof(bf16));
  }
  return {out, stride};
}

// Entries [position, position + count) of a sequence, count <= 64: in place if they are contiguous bf16, else
// gathered in `scratch` [64, entry_dim rounded up to 32] with the channels `wanted`. `padded` asks for rows readable in
// whole multiples of 32 elements.
inline Rows cached_rows(const Cache& cache, const std::int32_t* pages, std::int64_t position, std::int64_t count,
                        std::int64_t entry_dim, bool padded, std::initializer_list<Channels> wanted, bf16* scratch) {
  const bool follows = position % cache.page_size + count <= cache.page_size;
  if (cache.quantized == 0 && follows && (!padded || entry_dim % 32 == 0)) {
    const std::uint8_t* row = cached_row(cache, pages, position);
    return {reinterpret_cast<const bf16*>(row), entry_dim};
  }
  const auto row_of = [&](std::int64_t i) { return cached_row(cache, pages, position + i); };
  return gather_rows(cache, row_of, count, entry_dim, wanted, scratch);
}

inline Matrix view(const bf16* data, std::int64_t rows, std::int64_t columns, std::int64_t stride) {
  Matrix m;
  m.rows = rows;
  m.columns = columns;
  m.stride = stride;
  m.data = data;
  return m;
}

}  // namespace lowlat::LOWLAT_ISA
