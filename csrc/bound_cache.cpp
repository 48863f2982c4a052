#include "bound_cache.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <tuple>
#include <utility>

namespace lowlat {

IndexCache index_cache_of(const Array& keys, std::int64_t dim) {
  require(dim > 0 && dim % 2 == 0, "an index key has no channels, or an odd number");
  IndexCache cache;
  cache.page_size = size(keys, 1);
  require(cache.page_size > 0 && cache.page_size % kTile == 0, "pages of index keys are no multiple of 16 tokens");
  const std::int64_t width = (dim + 3) / 4 * 4 + 4;
  cache.tile_bytes = kTile * width;
  cache.data = elements<std::uint8_t>(keys, "index keys", Type::uint8, {size(keys, 0), cache.page_size, width});
  require(reinterpret_cast<std::uintptr_t>(cache.data) % 64 == 0, "index keys are not aligned to 64 bytes");
  return cache;
}

namespace {

using namespace nb::literals;

// The cache of one layer: entries [pages, page_size, entry], elements per entry, and how many of them are int8 (0:
// all bf16); index keys and their channels (0: no indexer).
using CacheArgs = std::tuple<Array, std::int64_t, std::int64_t, std::optional<Array>, std::int64_t>;

BoundCache make_cache(const std::vector<CacheArgs>& layers) {
  require(!layers.empty(), "a cache has no layers");
  BoundCache bound;
  for (const auto& [rows, entry_dim, quantized, index_keys, index_dim] : layers) {
    require(quantized >= 0 && quantized <= entry_dim, "quantized channels do not fit the row");
    Cache cache;
    cache.quantized = quantized;
    cache.row_bytes = quantized == 0
                          ? 2 * entry_dim
                          : (quantized + 3) / 4 * 4 + (quantized + 63) / 64 * 4 + 2 * (entry_dim - quantized);
    cache.page_size = size(rows, 1);
    const Type type = quantized == 0 ? Type::bf16 : Type::uint8;
    const std::int64_t width = quantized == 0 ? entry_dim : cache.row_bytes;
    cache.data = elements<std::uint8_t>(rows, "cache", type, {size(rows, 0), cache.page_size, width});
    bound.layers.push_back(cache);
    bound.entry_dims.push_back(entry_dim);
    bound.owners.push_back(rows);
    bound.pages = size(bound.owners[0], 0);
    require(size(rows, 0) == bound.pages && cache.page_size == bound.page_size(), "layers of a cache differ in pages");
    require(index_keys.has_value() == (index_dim > 0), "index keys and their channels come together");
    bound.index_dims.push_back(index_dim);
    bound.index_layers.push_back(index_keys ? index_cache_of(*index_keys, index_dim) : IndexCache{});
    if (!index_keys) continue;
    require(size(*index_keys, 0) == bound.pages && size(*index_keys, 1) == bound.page_size(), "index keys have other pages");
    bound.owners.push_back(*index_keys);
  }
  return bound;
}

}  // namespace

void bind_cache(nb::module_& module) {
  nb::class_<BoundCache>(module, "Cache").def_static("make", make_cache, "layers"_a);
}

}  // namespace lowlat
