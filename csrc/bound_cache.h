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
  std::vector<std::int64_t> row_dims;
  std::int64_t pages = 0;
  std::vector<Array> owners;

  std::int64_t page_size() const { return layers[0].page_size; }
};

// Adds class Cache to the module.
void bind_cache(nb::module_& module);

}  // namespace lowlat
