#include "readahead.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>

namespace lowlat {

namespace {

// Linux silently truncates a request to the file's readahead window or the device's largest transfer, whichever is
// larger. 128 KiB is the default window, so no request is truncated.
constexpr std::uintptr_t kPiece = 128 * 1024;

void read_ahead(const void* data, std::int64_t bytes) {
  if (data == nullptr) return;
  static const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto first = reinterpret_cast<std::uintptr_t>(data), last = first + static_cast<std::uintptr_t>(bytes);
  for (std::uintptr_t start = first / page * page; start < last; start += kPiece) {
    // Advice only: if it is refused, pages are read on first access.
    madvise(reinterpret_cast<void*>(start), std::min(kPiece, last - start), MADV_WILLNEED);
  }
}

void read_ahead(const Matrix& w) {
  // Scales of the other storages are one percent of the weights and are read on first access.
  if (!w.is_tiled()) return read_ahead(w.data, w.rows * w.stride * w.element_bytes());
  const std::int64_t groups = w.tiles() * w.groups();
  read_ahead(w.data, groups * w.group_bytes());
  read_ahead(w.scale, groups * kTile * 2);
  read_ahead(w.minimum, groups * kTile * 2);
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
  if (a.k_b) read_ahead(*a.k_b);
  if (layer.mlp) read_ahead(*layer.mlp);
  if (layer.moe) read_ahead(layer.moe->router.weight);
}

}  // namespace lowlat
