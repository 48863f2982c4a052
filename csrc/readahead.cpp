#include "readahead.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

namespace lowlat {

namespace {

void read_ahead(const Matrix& w) {
  if (w.data == nullptr || w.is_tiled()) return;  // tiles are made at load: no file holds them
  static const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto first = reinterpret_cast<std::uintptr_t>(w.data);
  const auto bytes = static_cast<std::uintptr_t>(w.rows * w.stride * w.element_bytes());
  const std::uintptr_t start = first / page * page;
  // Advice only: where it is refused, the pages come when they are touched.
  madvise(reinterpret_cast<void*>(start), first + bytes - start, MADV_WILLNEED);
}

}  // namespace

void read_ahead(const Mlp& mlp) {
  read_ahead(mlp.gate.weight);
  read_ahead(mlp.up.weight);
  read_ahead(mlp.down.weight);
}

void read_ahead(const Layer& layer) {
  const Attention& a = layer.attention;
  if (a.q_a) read_ahead(a.q_a->weight);
  for (const Projection* p : {&a.q, &a.kv_a, &a.k, &a.v, &a.o}) read_ahead(p->weight);
  read_ahead(a.kv_b);
  if (layer.mlp) read_ahead(*layer.mlp);
  if (layer.moe) read_ahead(layer.moe->router.weight);
}

}  // namespace lowlat
