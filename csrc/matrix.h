// Weights and activations as the kernels read them. Nothing here owns memory: Python keeps the tensors alive.
#pragma once

#include <cstdint>

namespace lowlat {

using bf16 = std::uint16_t;
using fp16 = std::uint16_t;

constexpr int kTile = 16;   // rows of a tile: one per lane
constexpr int kGroup = 32;  // columns that share a scale in int8 and int4; rows of activations are padded to it

enum class Storage { bf16, fp8, int8_rows, int8, int4 };

// y = x W^T for W [rows, columns].
//
// bf16, fp8, int8_rows lie row by row, `stride` elements apart, used where they are (a mapped file included):
//   fp8        e4m3, scale fp32 [ceil(rows / 128), ceil(columns / 128)]: a weight is bf16(value * scale of its block)
//   int8_rows  scale fp32 [rows], on the sum of the row
// int8 and int4 are made of tiles of 16 rows, cut into groups of 32 columns, for each row an fp16 scale [tiles, groups,
// 16]. A group is steps of 64 bytes: 4 bytes for each row, 2 for its even columns, 2 for its odd ones:
//   int8  8 steps: byte b of parity p is column 4s + 2b + p, as value + 128; weight = scale * value
//   int4  4 steps: byte b of parity p is column 8s + 4b + p in its low half and 8s + 4b + 2 + p in its high half;
//         weight = scale * value + minimum, the minimum as the scale
// Rows and columns beyond the matrix are stored as value 0, rows with a scale (and minimum) of 0.
struct Matrix {
  Storage storage = Storage::bf16;
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  std::int64_t stride = 0;
  std::int64_t first_row = 0;  // of a larger fp8 matrix whose blocks it lies in
  const void* data = nullptr;
  const void* scale = nullptr;
  const void* minimum = nullptr;
  // One byte per tile, nonzero where a tile holds a weight other than 0. Null: all do.
  const std::uint8_t* occupied = nullptr;

  std::int64_t tiles() const { return (rows + kTile - 1) / kTile; }
  std::int64_t tiles_across() const { return (columns + kTile - 1) / kTile; }
  std::int64_t groups() const { return (columns + kGroup - 1) / kGroup; }
  bool is_tiled() const { return storage == Storage::int8 || storage == Storage::int4; }
  // Bytes of a group of a tile.
  std::int64_t group_bytes() const { return storage == Storage::int8 ? 512 : 256; }
  // The groups of a tile of int8 or int4.
  const std::uint8_t* tile_data(std::int64_t tile) const {
    return static_cast<const std::uint8_t*>(data) + tile * groups() * group_bytes();
  }
  std::int64_t element_bytes() const { return storage == Storage::bf16 ? 2 : 1; }

  // Rows [first, first + count) of a matrix stored row by row.
  Matrix part(std::int64_t first, std::int64_t count) const {
    Matrix m = *this;
    m.rows = count;
    m.first_row += first;
    m.data = static_cast<const char*>(data) + first * stride * element_bytes();
    if (storage == Storage::int8_rows) m.scale = static_cast<const float*>(scale) + first;
    return m;
  }
};

// Rows of activations.
struct Activations {
  std::int64_t rows = 0;
  std::int64_t stride = 0;  // elements from row to row, a multiple of 32
  bf16* values = nullptr;   // [rows, stride], zeros beyond the columns
  // Rows of sequences with few new tokens: products then take the arithmetic that is fastest where reading the weights
  // is all the time. A property of the row, not of their number, so that bits do not depend on the batch.
  bool is_stream = false;

  Activations from(std::int64_t row) const { return {rows - row, stride, values + row * stride, is_stream}; }
};

}  // namespace lowlat
