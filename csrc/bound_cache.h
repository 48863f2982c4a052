// Python binding of the paged KV cache: BoundCache holds the tensors that own its memory.
#pragma once

#include <cstdint>
#include <vector>

#include "arrays.h"
#include "model.h"

namespace lowlat {

// The paged KV cache of all layers. Built once, and again when it grows.
struct BoundCache {
  std::vector<Cache> layers;
  std::vector<std::int64_t> entry_dims;
  std::vector<IndexCache> index_layers;
  std::vector<std::int64_t> index_dims;  // 0: no indexer
  std::int64_t pages = 0;
  std::vector<Array> owners;

  std::int64_t page_size() const { return layers[0].page_size; }
};

// The index keys of a layer, [pages, page_size, bytes of a key], for keys of `dim` channels.
IndexCache index_cache_of(const Array& keys, std::int64_t dim);

// Adds class Cache to the module.
void bind_cache(nb::module_& module);

}  // namespace lowlat
