#include "bound_cache.h"

#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>
#include <utility>

namespace lowlat {

namespace {

using namespace nb::literals;

// The cache of one layer: entries [pages, page_size, entry], elements per entry, and how many of them are int8 (0:
// all bf16).
using CacheArgs = std::tuple<Array, std::int64_t, std::int64_t>;

BoundCache make_cache(const std::vector<CacheArgs>& layers) {
  require(!layers.empty(), "a cache has no layers");
  BoundCache bound;
  for (const auto& [rows, row_dim, quantized] : layers) {
    require(quantized >= 0 && quantized <= row_dim, "quantized channels do not fit the row");
    Cache cache;
    cache.quantized = quantized;
    cache.row_bytes = quantized == 0
                          ? 2 * row_dim
                          : (quantized + 3) / 4 * 4 + (quantized + 63) / 64 * 4 + 2 * (row_dim - quantized);
    cache.page_size = size(rows, 1);
    const Type type = quantized == 0 ? Type::bf16 : Type::uint8;
    const std::int64_t width = quantized == 0 ? row_dim : cache.row_bytes;
    cache.data = elements<std::uint8_t>(rows, "cache", type, {size(rows, 0), cache.page_size, width});
    bound.layers.push_back(cache);
    bound.row_dims.push_back(row_dim);
    bound.owners.push_back(rows);
    bound.pages = size(bound.owners[0], 0);
    require(size(rows, 0) == bound.pages && cache.page_size == bound.page_size(), "layers of a cache differ in pages");
  }
  return bound;
}

}  // namespace

void bind_cache(nb::module_& module) {
  nb::class_<BoundCache>(module, "Cache").def_static("make", make_cache, "layers"_a);
}

}  // namespace lowlat
