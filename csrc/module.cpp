// lowlat._native, the Python module: levels, threads, token sampling, and single operations for tests and tools.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>

#include "arrays.h"
#include "bound_cache.h"
#include "bound_matrix.h"
#include "bound_model.h"
#include "bound_quantization.h"
#include "bound_training.h"
#include "dispatch.h"
#include "thread_pool.h"
#include "workspace.h"

namespace lowlat {

namespace {

using namespace nb::literals;

// Runs one operation on all threads with the GIL released.
template <class Job>
void run(Job&& job) {
  const nb::gil_scoped_release released;
  pool()->run(job);
}

// Rows of x padded to groups of 32 columns and aligned like the activations of a step.
struct PaddedRows {
  PaddedRows(const bf16* x, std::int64_t rows, std::int64_t columns) {
    const std::int64_t stride = (columns + kGroup - 1) / kGroup * kGroup;
    auto* values = static_cast<bf16*>(memory.reserve(rows * stride * sizeof(bf16)));
    for (std::int64_t r = 0; r < rows && columns > 0; ++r) {
      std::memcpy(values + r * stride, x + r * columns, columns * sizeof(bf16));
    }
    activations = {rows, stride, values, false};
  }

  Buffer memory;
  Activations activations;
};

void linear(const BoundMatrix& bound, const Array& x, const Array& out, bool is_decode, const std::string& level) {
  const Matrix& w = bound.matrix;
  const Ops& table = ops(level);
  const auto* values = elements<bf16>(x, "x", Type::bf16, {kAnySize, w.columns});
  const std::int64_t rows = size(x, 0);
  auto* result = elements<float>(out, "out", Type::fp32, {rows, w.rows});
  PaddedRows padded(values, rows, w.columns);
  padded.activations.is_decode = is_decode;
  run([&](Team& team) { table.linear(team, w, padded.activations, result); });
}

// Quantizes into the tensors that `to` was made of.
void pack(const Array& weights, const BoundMatrix& to, const std::string& level) {
  const Matrix& m = to.matrix;
  const Ops& table = ops(level);
  if (!m.is_tiled()) throw std::invalid_argument("only int8 and int4 matrices are packed");
  const bool is_bf16 = has_type(weights, Type::bf16);
  check(weights, "weights", is_bf16 ? Type::bf16 : Type::fp32, {m.rows, m.columns});
  if (!is_contiguous(weights, 1)) throw std::invalid_argument("weights has rows that are not contiguous");
  const std::int64_t stride = m.rows > 1 ? weights.stride(0) : m.columns;
  run([&](Team& team) { table.pack(team, weights.data(), is_bf16, stride, m); });
}

// The weights of a matrix in GGUF blocks, into fp32 or bf16.
void dequantize(const BoundMatrix& bound, const Array& out, const std::string& level) {
  const Matrix& w = bound.matrix;
  const Ops& table = ops(level);
  if (w.storage != Storage::gguf) throw std::invalid_argument("only matrices in GGUF blocks are dequantized");
  if (has_type(out, Type::bf16)) {
    auto* to = elements<bf16>(out, "out", Type::bf16, {w.rows, w.columns});
    return run([&](Team& team) { table.dequantize_to_bf16(team, w, to); });
  }
  auto* to = elements<float>(out, "out", Type::fp32, {w.rows, w.columns});
  run([&](Team& team) { table.dequantize(team, w, to); });
}

void interleave(const BoundMatrix& bound, const Array& out) {
  const Matrix& w = bound.matrix;
  if (w.storage != Storage::gguf || w.is_interleaved || !can_interleave(w.type)) {
    throw std::invalid_argument("only some GGUF types are interleaved");
  }
  const GgufTypeInfo* info = find_gguf_type(static_cast<std::int64_t>(w.type));
  auto* to = elements<std::uint8_t>(out, "out", Type::uint8, {w.tiles() * kTile, w.columns / info->columns * info->bytes});
  const Ops& table = ops();
  run([&](Team& team) { table.interleave(team, w, to); });
}

void rms_norm(const Array& x, const Array& weight, float eps, const Array& out, const std::string& level) {
  const Ops& table = ops(level);
  const std::int64_t rows = size(x, 0);
  Norm norm;
  norm.size = size(x, 1);
  norm.eps = eps;
  norm.weight = elements<float>(weight, "weight", Type::fp32, {norm.size});
  const auto* values = elements<bf16>(x, "x", Type::bf16, {rows, norm.size});
  auto* result = elements<bf16>(out, "out", Type::bf16, {rows, norm.size});
  run([&](Team& team) { table.rms_norm(team, norm, values, rows, result); });
}

void rotate(const Array& x, const Array& cos, const Array& sin, bool interleave, const std::string& level) {
  const Ops& table = ops(level);
  const std::int64_t tokens = size(x, 0), heads = size(x, 1), dim = size(x, 2);
  if (dim % 2 != 0) throw std::invalid_argument("x has an odd number of channels");
  auto* values = elements<bf16>(x, "x", Type::bf16, {tokens, heads, dim});
  const auto* c = elements<float>(cos, "cos", Type::fp32, {tokens, dim / 2});
  const auto* s = elements<float>(sin, "sin", Type::fp32, {tokens, dim / 2});
  run([&](Team& team) { table.rotate(team, values, tokens, heads, dim, c, s, interleave); });
}

void swiglu(const Array& gate, const Array& up, const Array& out, const std::string& level) {
  const Ops& table = ops(level);
  const std::int64_t rows = size(gate, 0), width = size(gate, 1);
  const auto* g = elements<bf16>(gate, "gate", Type::bf16, {rows, width});
  const auto* u = elements<bf16>(up, "up", Type::bf16, {rows, width});
  auto* result = elements<bf16>(out, "out", Type::bf16, {rows, width});
  run([&](Team& team) { table.swiglu(team, g, u, rows, width, result); });
}

// The router's parameters, as in lowlat.config's MoEConfig.
struct RoutingRule {
  std::int64_t chosen, groups, kept_groups, best_in_group;
  bool is_sigmoid, normalizes;
  float scaling;
};

Router router_of(const BoundMatrix& gate, const std::optional<Array>& bias, const RoutingRule& choice) {
  Router router;
  router.weight = gate.matrix;
  router.experts = gate.matrix.rows;
  if (bias) router.bias = elements<float>(*bias, "bias", Type::fp32, {router.experts});
  router.chosen = choice.chosen;
  router.groups = choice.groups;
  router.kept_groups = choice.kept_groups;
  router.best_in_group = choice.best_in_group;
  router.is_sigmoid = choice.is_sigmoid;
  router.normalizes = choice.normalizes;
  router.scaling = choice.scaling;
  const bool fits = router.groups >= 1 && router.experts % router.groups == 0 && router.kept_groups >= 1 &&
                    router.kept_groups <= router.groups && router.chosen >= 1 && router.best_in_group >= 1 &&
                    router.chosen <= router.experts / router.groups * router.kept_groups;
  if (!fits) throw std::invalid_argument("experts, groups and choices do not fit each other");
  return router;
}

void route(const Array& x, const BoundMatrix& gate, const std::optional<Array>& bias, const RoutingRule& choice,
           const Array& experts, const Array& weights, const Array& scores, const std::string& level) {
  const Ops& table = ops(level);
  const Router router = router_of(gate, bias, choice);
  const std::int64_t tokens = size(x, 0);
  auto* chosen = elements<std::int32_t>(experts, "experts", Type::int32, {tokens, router.chosen});
  auto* factors = elements<float>(weights, "weights", Type::fp32, {tokens, router.chosen});
  auto* all = elements<float>(scores, "scores", Type::fp32, {tokens, router.experts});
  linear(gate, x, scores, false, level);
  run([&](Team& team) { table.route(team, router, tokens, all, chosen, factors); });
}

// Where heads find their key and value in a cache entry; see PagedAttention.
struct EntryLayout {
  std::int64_t kv_heads, key_step, value_dim, value_step, value_offset;
};

Cache cache_of(const Array& cache, std::int64_t page_size, std::int64_t entry_dim, std::int64_t quantized) {
  Cache result;
  const std::int64_t scales = (quantized + 63) / 64 * 4;
  const std::int64_t row_bytes =
      quantized == 0 ? 2 * entry_dim : (quantized + 3) / 4 * 4 + scales + 2 * (entry_dim - quantized);
  result.data = elements<std::uint8_t>(cache, "cache", Type::uint8, {kAnySize, page_size, row_bytes});
  result.row_bytes = row_bytes;
  result.page_size = page_size;
  result.quantized = quantized;
  return result;
}

void store_entries(const Array& rows, const Array& cache, std::int64_t quantized, const std::string& level) {
  const Ops& table = ops(level);
  const std::int64_t count = size(rows, 0), entry_dim = size(rows, 1);
  if (quantized < 0 || quantized > entry_dim) throw std::invalid_argument("quantized channels do not fit the rows");
  const auto* values = elements<bf16>(rows, "rows", Type::bf16, {count, entry_dim});
  const Cache to = cache_of(cache, size(cache, 1), entry_dim, quantized);
  if (size(cache, 0) * to.page_size < count) throw std::invalid_argument("the cache is too small for the rows");
  run([&](Team& team) { table.store_entries(team, values, count, entry_dim, to); });
}

void check_pages(const PagedAttention& a, std::int64_t pages, std::int64_t all_pages) {
  const std::int64_t rows = pages * a.cache.page_size;
  if (a.start < 0 || a.queries > rows || a.start > rows - a.queries) {
    throw std::invalid_argument("pages are too few for the positions");
  }
  for (std::int64_t i = 0; i < pages; ++i) {
    if (a.pages[i] < 0 || a.pages[i] >= all_pages) throw std::invalid_argument("pages has an entry outside the cache");
  }
}

void attention(const Array& q, const Array& cache, const Array& pages, std::int64_t entry_dim, std::int64_t quantized,
               std::int64_t start, float scale, std::int64_t window, const EntryLayout& layout, const Array& out,
               const std::string& level) {
  const Ops& table = ops(level);
  PagedAttention a;
  a.queries = size(q, 0);
  a.heads = size(q, 1);
  a.key_dim = size(q, 2);
  a.entry_dim = entry_dim;
  a.start = start;
  a.scale = scale;
  a.window = window;
  a.kv_heads = layout.kv_heads;
  a.key_step = layout.key_step;
  a.value_dim = layout.value_dim;
  a.value_step = layout.value_step;
  a.value_offset = layout.value_offset;
  const std::int64_t group = a.kv_heads - 1;
  const bool is_in_range = a.kv_heads >= 1 && a.key_step >= 0 && a.value_step >= 0 && a.value_offset >= 0 &&
                           a.value_dim >= 0 && a.window >= 0 && quantized >= 0 && size(cache, 1) > 0;
  if (!is_in_range || a.heads % a.kv_heads != 0 || group * a.key_step + a.key_dim > entry_dim ||
      a.value_offset + group * a.value_step + a.value_dim > entry_dim || quantized > entry_dim) {
    throw std::invalid_argument("heads do not fit the cached rows");
  }
  a.cache = cache_of(cache, size(cache, 1), entry_dim, quantized);
  a.pages = elements<std::int32_t>(pages, "pages", Type::int32, {kAnySize});
  check_pages(a, size(pages, 0), size(cache, 0));
  a.out = elements<bf16>(out, "out", Type::bf16, {a.queries, a.heads, a.value_dim});
  const PaddedRows padded(elements<bf16>(q, "q", Type::bf16, {a.queries, a.heads, a.key_dim}), a.queries * a.heads,
                          a.key_dim);
  a.q = padded.activations.values;
  a.q_stride = padded.activations.stride;
  run([&](Team& team) { table.attention(team, a); });
}

void store_index_keys(const Array& keys, const Array& cache, const std::string& level) {
  const Ops& table = ops(level);
  const std::int64_t count = size(keys, 0), dim = size(keys, 1);
  const auto* values = elements<bf16>(keys, "keys", Type::bf16, {count, dim});
  const IndexCache to = index_cache_of(cache, dim);
  if (size(cache, 0) * to.page_size < count) throw std::invalid_argument("the cache is too small for the keys");
  run([&](Team& team) { table.store_index_keys(team, values, count, dim, to); });
}

void choose_tokens(const Array& q, const Array& weights, const Array& cache, const Array& pages, std::int64_t start,
                   std::int64_t topk, const Array& scores, const Array& chosen, const std::string& level) {
  const Ops& table = ops(level);
  TokenChoice c;
  c.queries = size(q, 0);
  c.heads = size(q, 1);
  c.dim = size(q, 2);
  c.start = start;
  c.topk = topk;
  c.q = elements<bf16>(q, "q", Type::bf16, {c.queries, c.heads, c.dim});
  c.weights = elements<float>(weights, "weights", Type::fp32, {c.queries, c.heads});
  c.cache = index_cache_of(cache, c.dim);
  c.pages = elements<std::int32_t>(pages, "pages", Type::int32, {kAnySize});
  const std::int64_t count = size(pages, 0), keys = start + c.queries;
  require(c.heads > 0 && topk > 0 && start >= topk, "queries see no more keys than they choose");
  require(keys <= count * c.cache.page_size, "pages are too few for the positions");
  for (std::int64_t i = 0; i < count; ++i) {
    require(c.pages[i] >= 0 && c.pages[i] < size(cache, 0), "pages has an entry outside the cache");
  }
  c.score_stride = (keys + 63) / 64 * 64;
  c.scores = elements<float>(scores, "scores", Type::fp32, {c.queries, c.score_stride});
  c.chosen = elements<std::int32_t>(chosen, "chosen", Type::int32, {c.queries, topk});
  run([&](Team& team) { table.choose_tokens(team, c); });
}

// Sampling buffers, reused from call to call: fresh memory pages would cost as much as the sampling itself.
struct DrawBuffers {
  Buffer weights, bins, pieces;
};

std::int64_t draw(const Array& logits, double number, double temperature, std::int64_t top_k, double top_p,
                  double min_p, const std::string& level) {
  const Ops& table = ops(level);
  DrawPass pass;
  pass.size = size(logits, 0);
  pass.logits = elements<float>(logits, "logits", Type::fp32, {pass.size});
  const bool is_valid = pass.size > 0 && 0 <= number && number < 1 && temperature > 0 && top_k >= 0 && top_p > 0 &&
                        top_p <= 1 && min_p >= 0 && min_p <= 1;
  if (!is_valid) throw std::invalid_argument("sampling options are out of range");
  pass.number = number;
  pass.temperature = temperature;
  pass.top_k = top_k;
  pass.top_p = top_p;
  pass.min_p = min_p;
  static thread_local DrawBuffers buffer_array;
  const auto pieces = static_cast<std::size_t>(draw_pieces(pass.size));
  pass.weights = static_cast<double*>(buffer_array.weights.reserve(pass.size * sizeof(double)));
  pass.bins = static_cast<double*>(buffer_array.bins.reserve(kDrawLevels * pieces * kDrawBinStride * sizeof(double)));
  pass.pieces = static_cast<DrawPiece*>(buffer_array.pieces.reserve(pieces * sizeof(DrawPiece)));
  std::int64_t token = -1;
  pass.token = &token;
  {
    // On the calling thread alone: waking another one takes longer than it would save.
    const nb::gil_scoped_release released;
    Pool(1).run([&](Team& team) { table.draw(team, pass); });
  }
  if (token < 0) throw std::invalid_argument("the largest logit is not finite");
  return token;
}

// Number, name, columns and bytes of a block of every GGUF type that matrices can have, and whether it interleaves.
nb::list gguf_types() {
  nb::list types;
  for (const GgufTypeInfo& info : kGgufTypes) {
    types.append(nb::make_tuple(static_cast<int>(info.type), info.name, info.columns, info.bytes,
                                can_interleave(info.type)));
  }
  return types;
}

void bind_ops(nb::module_& module) {
  module.def("linear", linear, "matrix"_a, "x"_a, "out"_a, "is_decode"_a = false, "level"_a = "");
  module.def("pack", pack, "weights"_a, "to"_a, "level"_a = "");
  module.def("dequantize", dequantize, "matrix"_a, "out"_a, "level"_a = "");
  module.def("interleave", interleave, "rows"_a, "out"_a);
  module.def("rms_norm", rms_norm, "x"_a, "weight"_a, "eps"_a, "out"_a, "level"_a = "");
  module.def("rotate", rotate, "x"_a, "cos"_a, "sin"_a, "interleave"_a, "level"_a = "");
  module.def("swiglu", swiglu, "gate"_a, "up"_a, "out"_a, "level"_a = "");
  nb::class_<RoutingRule>(module, "RoutingRule")
      .def(nb::init<std::int64_t, std::int64_t, std::int64_t, std::int64_t, bool, bool, float>(), nb::kw_only(),
           "chosen"_a, "groups"_a, "kept_groups"_a, "best_in_group"_a, "is_sigmoid"_a, "normalizes"_a, "scaling"_a);
  module.def("route", route, "x"_a, "gate"_a, "bias"_a.none(), "choice"_a, "experts"_a, "weights"_a, "scores"_a,
             "level"_a = "");
  module.def("draw", draw, "logits"_a, "number"_a, nb::kw_only(), "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a,
             "level"_a = "");
  nb::class_<EntryLayout>(module, "EntryLayout")
      .def(nb::init<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t>(), nb::kw_only(),
           "kv_heads"_a, "key_step"_a, "value_dim"_a, "value_step"_a, "value_offset"_a);
  module.def("store_entries", store_entries, "rows"_a, "cache"_a, nb::kw_only(), "quantized"_a, "level"_a = "");
  module.def("attention", attention, "q"_a, "cache"_a, "pages"_a, nb::kw_only(), "entry_dim"_a, "quantized"_a, "start"_a,
             "scale"_a, "window"_a, "layout"_a, "out"_a, "level"_a = "");
  module.def("store_index_keys", store_index_keys, "keys"_a, "cache"_a, nb::kw_only(), "level"_a = "");
  module.def("choose_tokens", choose_tokens, "q"_a, "weights"_a, "cache"_a, "pages"_a, nb::kw_only(), "start"_a,
             "topk"_a, "scores"_a, "chosen"_a, "level"_a = "");
}

}  // namespace

}  // namespace lowlat

NB_MODULE(_native, module) {
  using namespace lowlat;
  using namespace nb::literals;
  // Objects alive at exit are released with the process: Python does not tear down modules that are still referenced.
  nb::set_leak_warnings(false);
  module.def("built_levels", built_levels);
  module.def("usable_levels", usable_levels);
  module.def("level", [] { return std::string(ops().name); });
  module.def("set_level", set_level, "level"_a);
  module.def("set_threads", set_threads, "threads"_a, nb::call_guard<nb::gil_scoped_release>());
  module.def("threads", get_threads);
  module.def("time_phases", time_phases, "threads"_a, "phases"_a, "items"_a, "shrinking"_a,
             nb::call_guard<nb::gil_scoped_release>());
  module.def("gguf_types", gguf_types);
  bind_matrix(module);
  bind_cache(module);
  bind_ops(module);
  bind_model(module);
  bind_training(module);
  bind_quantization(module);
}
