// Weight storage (bf16, fp8, int8, int4) and activation layout of the kernels. Nothing here owns memory: Python keeps
// the tensors alive.
#pragma once

#include <cstdint>

#include "gguf_types.h"

namespace lowlat {

using bf16 = std::uint16_t;
using fp16 = std::uint16_t;

constexpr int kTile = 16;   // rows of a tile: one per SIMD lane
constexpr int kGroup = 32;  // columns that share a scale in int8 and int4; activation rows are padded to a multiple

enum class Storage { bf16, fp8, fp8_rows, int8_rows, int8, int4, gguf };

// y = x W^T for W [rows, columns].
//
// bf16, fp8, fp8_rows and int8_rows are row-major with `stride` elements between rows, used in place, also in a memory-mapped
// file:
//   fp8        e4m3, scale fp32 [ceil(rows / 128), ceil(columns / 128)]: a weight is bf16(value * scale of its block)
//   fp8_rows   e4m3, scale fp32 [rows], on the sum of the row
//   int8_rows  likewise
// gguf is row-major, too: `stride` bytes between rows, which are blocks of `type`, as in a GGUF file. If interleaved,
// blocks of 16 rows form one, in which each element of a block (gguf_types.h) is followed by those of the other rows;
// rows beyond the matrix are bytes of 0.
// int8 and int4 are stored in tiles of 16 rows, cut into groups of 32 columns, with an fp16 scale per row and group
// [tiles, groups, 16]. A group consists of steps of 64 bytes: 4 bytes per row, 2 for its even columns, 2 for its odd
// ones:
//   int8  8 steps: byte b of parity p is column 4s + 2b + p, as value + 128; weight = scale * value
//   int4  4 steps: byte b of parity p is column 8s + 4b + p in its low half and 8s + 4b + 2 + p in its high half;
//         weight = scale * value + minimum, the minimum as the scale
// Rows and columns beyond the matrix are stored as value 0; such rows have a scale (and minimum) of 0.
struct Matrix {
  Storage storage = Storage::bf16;
  GgufType type{};  // of storage gguf
  bool is_interleaved = false;
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  std::int64_t stride = 0;
  std::int64_t first_row = 0;  // if this is a view of a larger fp8 matrix, whose blocks it shares
  const void* data = nullptr;
  const void* scale = nullptr;
  const void* minimum = nullptr;
  // One byte per tile, nonzero if the tile has a weight other than 0. Null: all tiles have.
  const std::uint8_t* occupied = nullptr;

  std::int64_t tiles() const { return (rows + kTile - 1) / kTile; }
  std::int64_t tiles_across() const { return (columns + kTile - 1) / kTile; }
  std::int64_t groups() const { return (columns + kGroup - 1) / kGroup; }
  bool has_row_scales() const { return storage == Storage::fp8_rows || storage == Storage::int8_rows; }
  bool is_tiled() const { return storage == Storage::int8 || storage == Storage::int4; }
  // Bytes of one group of a tile.
  std::int64_t group_bytes() const { return storage == Storage::int8 ? 512 : 256; }
  // Groups per tile of int8 or int4.
  const std::uint8_t* tile_data(std::int64_t tile) const {
    return static_cast<const std::uint8_t*>(data) + tile * groups() * group_bytes();
  }
  std::int64_t element_bytes() const { return storage == Storage::bf16 ? 2 : 1; }

  // Rows [first, first + count) of a row-major matrix.
  Matrix part(std::int64_t first, std::int64_t count) const {
    Matrix m = *this;
    m.rows = count;
    m.first_row += first;
    m.data = static_cast<const char*>(data) + first * stride * element_bytes();
    if (has_row_scales()) m.scale = static_cast<const float*>(scale) + first;
    return m;
  }
};

// Activation rows, bf16.
struct Activations {
  std::int64_t rows = 0;
  std::int64_t stride = 0;  // elements between rows, a multiple of 32
  bf16* values = nullptr;   // [rows, stride], zeros beyond the columns
  // Rows of decoding sequences (at most 32 new tokens): products take the GEMV path, which is fastest when weight
  // bandwidth is the bound. A property of the row, not of the number of rows, so that bits do not depend on the
  // batch.
  bool is_decode = false;

  Activations from(std::int64_t row) const { return {rows - row, stride, values + row * stride, is_decode}; }
};

}  // namespace lowlat
