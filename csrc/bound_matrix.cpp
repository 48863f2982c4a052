#include "bound_matrix.h"

#include <nanobind/stl/optional.h>

namespace lowlat {

namespace {

using Optional = std::optional<Array>;

// Row-major weights: rows may have a stride, the elements of a row are contiguous.
BoundMatrix by_rows(Storage storage, const Array& weight, Type type) {
  check(weight, "weight", type, {kAnySize, kAnySize});
  if (!is_contiguous(weight, 1)) throw std::invalid_argument("weight has rows that are not contiguous");
  BoundMatrix bound;
  bound.matrix.storage = storage;
  bound.matrix.rows = size(weight, 0);
  bound.matrix.columns = size(weight, 1);
  bound.matrix.stride = bound.matrix.rows > 1 ? weight.stride(0) : bound.matrix.columns;
  bound.matrix.data = weight.data();
  bound.owners.push_back(weight);
  return bound;
}

void attach_occupied(BoundMatrix& bound, const Optional& occupied) {
  if (!occupied) return;
  bound.matrix.occupied = elements<const std::uint8_t>(*occupied, "occupied", Type::uint8, {bound.matrix.tiles()});
  bound.owners.push_back(*occupied);
}

BoundMatrix make_bf16(const Array& weight, const Optional& occupied) {
  BoundMatrix bound = by_rows(Storage::bf16, weight, Type::bf16);
  attach_occupied(bound, occupied);
  return bound;
}

BoundMatrix make_fp8(const Array& weight, const Array& scale, const Optional& occupied) {
  BoundMatrix bound = by_rows(Storage::fp8, weight, Type::uint8);
  const Matrix& m = bound.matrix;
  bound.matrix.scale = elements<float>(scale, "scale", Type::fp32, {(m.rows + 127) / 128, (m.columns + 127) / 128});
  bound.owners.push_back(scale);
  attach_occupied(bound, occupied);
  return bound;
}

BoundMatrix make_rows(Storage storage, Type type, const Array& weight, const Array& scale, const Optional& occupied) {
  BoundMatrix bound = by_rows(storage, weight, type);
  bound.matrix.scale = elements<float>(scale, "scale", Type::fp32, {bound.matrix.rows});
  bound.owners.push_back(scale);
  attach_occupied(bound, occupied);
  return bound;
}

BoundMatrix make_fp8_rows(const Array& weight, const Array& scale, const Optional& occupied) {
  return make_rows(Storage::fp8_rows, Type::uint8, weight, scale, occupied);
}

BoundMatrix make_int8_rows(const Array& weight, const Array& scale, const Optional& occupied) {
  return make_rows(Storage::int8_rows, Type::int8, weight, scale, occupied);
}

// Weights in tiles of 16 rows and quantization groups of 32 columns.
BoundMatrix in_tiles(Storage storage, const Array& weight, const Array& scale, const Optional& minimum,
                     std::int64_t rows, std::int64_t columns) {
  if (rows < 0 || columns < 0) throw std::invalid_argument("rows and columns are counts");
  BoundMatrix bound;
  Matrix& m = bound.matrix;
  m.storage = storage;
  m.rows = rows;
  m.columns = columns;
  const std::int64_t tiles = m.tiles(), groups = m.groups();
  const std::int64_t steps = storage == Storage::int8 ? 8 : 4;
  m.data = elements<std::uint8_t>(weight, "weight", Type::uint8, {tiles, groups, steps, 16, 2, 2});
  m.scale = elements<fp16>(scale, "scale", Type::fp16, {tiles, groups, 16});
  bound.owners = {weight, scale};
  if (minimum) {
    m.minimum = elements<fp16>(*minimum, "minimum", Type::fp16, {tiles, groups, 16});
    bound.owners.push_back(*minimum);
  }
  return bound;
}

BoundMatrix make_int8(const Array& weight, const Array& scale, std::int64_t rows, std::int64_t columns,
                      const Optional& occupied) {
  BoundMatrix bound = in_tiles(Storage::int8, weight, scale, std::nullopt, rows, columns);
  attach_occupied(bound, occupied);
  return bound;
}

BoundMatrix make_int4(const Array& weight, const Array& scale, const Array& minimum, std::int64_t rows,
                      std::int64_t columns, const Optional& occupied) {
  BoundMatrix bound = in_tiles(Storage::int4, weight, scale, minimum, rows, columns);
  attach_occupied(bound, occupied);
  return bound;
}

// Rows in GGUF blocks, contiguous bytes each; `type` is the number in files. With `interleaved_rows`, these are
// interleaved.
BoundMatrix make_gguf(const Array& weight, std::int64_t type, std::optional<std::int64_t> interleaved_rows,
                      const Optional& occupied) {
  const GgufTypeInfo* info = find_gguf_type(type);
  if (info == nullptr) throw std::invalid_argument("no GGUF type " + std::to_string(type));
  BoundMatrix bound = by_rows(Storage::gguf, weight, Type::uint8);
  const std::int64_t bytes = bound.matrix.columns;
  if (bytes % info->bytes != 0) throw std::invalid_argument("weight has rows that are not whole blocks");
  bound.matrix.type = info->type;
  bound.matrix.columns = bytes / info->bytes * info->columns;
  if (interleaved_rows) {
    const std::int64_t padded = bound.matrix.rows;
    bound.matrix.is_interleaved = true;
    bound.matrix.rows = *interleaved_rows;
    bound.matrix.stride = bytes;
    if (!can_interleave(info->type) || *interleaved_rows < 0 || padded != bound.matrix.tiles() * kTile ||
        !is_contiguous(weight)) {
      throw std::invalid_argument("weight is not interleaved rows");
    }
  }
  attach_occupied(bound, occupied);
  return bound;
}

}  // namespace

void bind_matrix(nb::module_& module) {
  using namespace nb::literals;
  nb::class_<BoundMatrix>(module, "Matrix")
      .def_static("bf16", make_bf16, "weight"_a, nb::kw_only(), "occupied"_a = nb::none())
      .def_static("fp8", make_fp8, "weight"_a, "scale"_a, nb::kw_only(), "occupied"_a = nb::none())
      .def_static("fp8_rows", make_fp8_rows, "weight"_a, "scale"_a, nb::kw_only(), "occupied"_a = nb::none())
      .def_static("int8_rows", make_int8_rows, "weight"_a, "scale"_a, nb::kw_only(), "occupied"_a = nb::none())
      .def_static("int8", make_int8, "weight"_a, "scale"_a, nb::kw_only(), "rows"_a, "columns"_a,
                  "occupied"_a = nb::none())
      .def_static("int4", make_int4, "weight"_a, "scale"_a, "minimum"_a, nb::kw_only(), "rows"_a, "columns"_a,
                  "occupied"_a = nb::none())
      .def_static("gguf", make_gguf, "weight"_a, nb::kw_only(), "type"_a, "interleaved_rows"_a = nb::none(),
                  "occupied"_a = nb::none())
      .def_prop_ro("rows", [](const BoundMatrix& bound) { return bound.matrix.rows; })
      .def_prop_ro("columns", [](const BoundMatrix& bound) { return bound.matrix.columns; });
}

}  // namespace lowlat
