#include "bound_training.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cmath>
#include <optional>

#include "arrays.h"
#include "dispatch.h"
#include "thread_pool.h"
#include "workspace.h"

namespace lowlat {

namespace {

using namespace nb::literals;

template <class Pass>
void run(void (*kernel)(Team&, const Pass&), const Pass& pass) {
  const nb::gil_scoped_release released;
  pool()->run([&](Team& team) { kernel(team, pass); });
}

// Contiguous values of the type that `is_bf16` selects.
Values values(const Array& array, const char* name, bool is_bf16, std::initializer_list<std::int64_t> shape) {
  return {elements<void>(array, name, is_bf16 ? Type::bf16 : Type::fp32, shape), is_bf16};
}

// Values whose rows may be columns of a wider matrix; `stride` must equal that of `like`.
Values strided(const Array& array, const char* name, bool is_bf16, std::int64_t rows, std::int64_t size,
               std::int64_t stride) {
  check(array, name, is_bf16 ? Type::bf16 : Type::fp32, {rows, size});
  const bool fits = rows < 2 || array.stride(0) == stride;
  if (!fits || !is_contiguous(array, 1)) throw std::invalid_argument(std::string(name) + " has other strides");
  return {const_cast<void*>(static_cast<const void*>(array.data())), is_bf16};
}

NormPass norm(const Array& x, const Array& weight, float eps, const Array& out, const Array& inverse) {
  NormPass pass;
  pass.rows = size(x, 0);
  pass.size = size(x, 1);
  pass.eps = eps;
  const bool is_bf16 = has_type(x, Type::bf16);
  pass.weight = elements<float>(weight, "weight", Type::fp32, {pass.size});
  pass.x = values(x, "x", is_bf16, {pass.rows, pass.size});
  pass.out = values(out, "out", is_bf16, {pass.rows, pass.size});
  pass.inverse = elements<float>(inverse, "inverse", Type::fp32, {pass.rows});
  return pass;
}

void norm_forward(const Array& x, const Array& weight, float eps, const Array& out, const Array& inverse,
                  const std::string& level) {
  run(ops(level).norm_forward, norm(x, weight, eps, out, inverse));
}

void norm_backward(const Array& x, const Array& weight, float eps, const Array& inverse, const Array& grad,
                   const Array& grad_x, const Array& grad_weight, const Array& partial, const std::string& level) {
  NormPass pass = norm(x, weight, eps, grad_x, inverse);
  pass.grad = values(grad, "grad", pass.x.is_bf16, {pass.rows, pass.size});
  pass.grad_weight = elements<float>(grad_weight, "grad_weight", Type::fp32, {pass.size});
  const std::int64_t pieces = (pass.rows + kNormPiece - 1) / kNormPiece;
  pass.partial = elements<float>(partial, "partial", Type::fp32, {pieces, pass.size});
  run(ops(level).norm_backward, pass);
}

GatedPass gated(const Array& gate, const Array& up, const std::optional<Array>& inner) {
  GatedPass pass;
  pass.rows = size(gate, 0);
  pass.size = size(gate, 1);
  const bool is_bf16 = has_type(gate, Type::bf16);
  pass.stride = pass.rows > 1 ? gate.stride(0) : pass.size;
  pass.gate = strided(gate, "gate", is_bf16, pass.rows, pass.size, pass.stride);
  pass.up = strided(up, "up", is_bf16, pass.rows, pass.size, pass.stride);
  if (inner) pass.inner = values(*inner, "inner", is_bf16, {pass.rows, pass.size});
  return pass;
}

void gated_forward(const Array& gate, const Array& up, const Array& inner, const std::string& level) {
  run(ops(level).gated_forward, gated(gate, up, inner));
}

void gated_backward(const Array& gate, const Array& up, const Array& grad, const std::optional<Array>& factors,
                    const std::optional<Array>& inner, const Array& grad_gate, const Array& grad_up,
                    const std::optional<Array>& grad_factors, const std::string& level) {
  GatedPass pass = gated(gate, up, inner);
  const bool is_bf16 = pass.gate.is_bf16;
  pass.grad = values(grad, "grad", is_bf16, {pass.rows, pass.size});
  if (factors) pass.factors = elements<float>(*factors, "factors", Type::fp32, {pass.rows});
  pass.grad_gate = strided(grad_gate, "grad_gate", is_bf16, pass.rows, pass.size, pass.stride);
  pass.grad_up = strided(grad_up, "grad_up", is_bf16, pass.rows, pass.size, pass.stride);
  if (grad_factors && !inner) throw std::invalid_argument("grad_factors needs inner");
  if (grad_factors) pass.grad_factors = elements<float>(*grad_factors, "grad_factors", Type::fp32, {pass.rows});
  run(ops(level).gated_backward, pass);
}

void entropy(const Array& logits, const Array& targets, const Array& counted, float z_weight, const Array& nll,
             const Array& z, const std::string& level) {
  EntropyPass pass;
  pass.rows = size(logits, 0);
  pass.size = size(logits, 1);
  if (pass.size == 0) throw std::invalid_argument("logits has no columns");
  pass.logits = values(logits, "logits", has_type(logits, Type::bf16), {pass.rows, pass.size});
  pass.targets = elements<std::int64_t>(targets, "targets", Type::int64, {pass.rows});
  pass.counted = elements<bool>(counted, "counted", Type::uint8, {pass.rows});
  pass.z_weight = z_weight;
  pass.nll = elements<float>(nll, "nll", Type::fp32, {pass.rows});
  pass.z = elements<float>(z, "z", Type::fp32, {pass.rows});
  for (std::int64_t r = 0; r < pass.rows; ++r) {
    if (pass.targets[r] < 0 || pass.targets[r] >= pass.size) throw std::invalid_argument("targets has an entry outside the vocabulary");
  }
  run(ops(level).entropy, pass);
}

void divergence(const Array& logits, const Array& teacher, const Array& targets, const Array& counted, float nll_weight,
                bool wants_gradient, const Array& kl, const Array& nll, const std::string& level) {
  DivergencePass pass;
  pass.rows = size(logits, 0);
  pass.size = size(logits, 1);
  if (pass.size == 0) throw std::invalid_argument("logits has no columns");
  const bool is_bf16 = has_type(logits, Type::bf16);
  pass.logits = values(logits, "logits", is_bf16, {pass.rows, pass.size});
  pass.teacher = values(teacher, "teacher", is_bf16, {pass.rows, pass.size});
  pass.targets = elements<std::int64_t>(targets, "targets", Type::int64, {pass.rows});
  pass.counted = elements<bool>(counted, "counted", Type::uint8, {pass.rows});
  pass.nll_weight = nll_weight;
  pass.wants_gradient = wants_gradient;
  pass.kl = elements<float>(kl, "kl", Type::fp32, {pass.rows});
  pass.nll = elements<float>(nll, "nll", Type::fp32, {pass.rows});
  for (std::int64_t r = 0; r < pass.rows; ++r) {
    if (pass.targets[r] < 0 || pass.targets[r] >= pass.size) throw std::invalid_argument("targets has an entry outside the vocabulary");
  }
  run(ops(level).divergence, pass);
}

void rotation(const Array& x, const Array& cos, const Array& sin, bool interleave, bool is_inverse, const Array& out,
              const std::string& level) {
  RotationPass pass;
  pass.tokens = size(x, 0);
  pass.heads = size(x, 1);
  pass.dim = size(x, 2);
  const bool is_bf16 = has_type(x, Type::bf16);
  check(x, "x", is_bf16 ? Type::bf16 : Type::fp32, {pass.tokens, pass.heads, pass.dim});
  if (pass.dim % 2 != 0) throw std::invalid_argument("heads have no pairs");
  if (!is_contiguous(x, 2)) throw std::invalid_argument("x has other strides");
  pass.x = {const_cast<void*>(static_cast<const void*>(x.data())), is_bf16};
  pass.token_step = x.stride(0);
  pass.head_step = x.stride(1);
  pass.out = values(out, "out", is_bf16, {pass.tokens, pass.heads, pass.dim});
  pass.table_step = pass.tokens > 1 ? cos.stride(0) : pass.dim / 2;
  pass.cos = static_cast<const float*>(strided(cos, "cos", false, pass.tokens, pass.dim / 2, pass.table_step).data);
  pass.sin = static_cast<const float*>(strided(sin, "sin", false, pass.tokens, pass.dim / 2, pass.table_step).data);
  pass.interleave = interleave;
  pass.is_inverse = is_inverse;
  run(ops(level).rotation, pass);
}

void combine(const Array& rows, const std::optional<Array>& factors, const Array& places, const Array& out,
             const std::string& level) {
  CombinePass pass;
  const std::int64_t count = size(rows, 0);
  pass.tokens = size(places, 0);
  pass.chosen = size(places, 1);
  pass.size = size(rows, 1);
  const bool is_bf16 = has_type(rows, Type::bf16);
  pass.rows = values(rows, "rows", is_bf16, {count, pass.size});
  if (factors) pass.factors = elements<float>(*factors, "factors", Type::fp32, {count});
  pass.places = elements<std::int64_t>(places, "places", Type::int64, {pass.tokens, pass.chosen});
  pass.out = values(out, "out", is_bf16, {pass.tokens, pass.size});
  for (std::int64_t i = 0; i < pass.tokens * pass.chosen; ++i) {
    if (pass.places[i] < 0 || pass.places[i] >= count) throw std::invalid_argument("places has an entry outside the rows");
  }
  run(ops(level).combine, pass);
}

// The row count of every expert: none negative, their sum the number of rows.
const std::int64_t* group_counts(const Array& counts, std::int64_t experts, std::int64_t rows) {
  const auto* each = elements<std::int64_t>(counts, "counts", Type::int64, {experts});
  std::int64_t left = rows;
  for (std::int64_t e = 0; e < experts; ++e) {
    if (each[e] < 0 || each[e] > left) throw std::invalid_argument("counts do not fit the rows");
    left -= each[e];
  }
  if (left != 0) throw std::invalid_argument("counts do not fit the rows");
  return each;
}

void grouped(const Array& rows, const Array& weight, const Array& counts, bool is_transposed, const Array& products,
             const std::string& level) {
  GroupedPass pass;
  const std::int64_t count = size(rows, 0);
  pass.experts = size(weight, 0);
  pass.out = size(weight, 1);
  pass.in = size(weight, 2);
  pass.counts = group_counts(counts, pass.experts, count);
  pass.weight = values(weight, "weight", has_type(weight, Type::bf16), {pass.experts, pass.out, pass.in});
  pass.is_transposed = is_transposed;
  pass.rows = elements<bf16>(rows, "rows", Type::bf16, {count, is_transposed ? pass.out : pass.in});
  pass.products = elements<bf16>(products, "products", Type::bf16, {count, is_transposed ? pass.in : pass.out});
  run(ops(level).grouped, pass);
}

void outer(const Array& left, const Array& right, const Array& counts, const Array& sums, const std::string& level) {
  OuterPass pass;
  const std::int64_t count = size(left, 0);
  pass.experts = size(sums, 0);
  pass.out = size(sums, 1);
  pass.in = size(sums, 2);
  pass.counts = group_counts(counts, pass.experts, count);
  pass.left = elements<bf16>(left, "left", Type::bf16, {count, pass.out});
  pass.right = elements<bf16>(right, "right", Type::bf16, {count, pass.in});
  pass.sums = elements<float>(sums, "sums", Type::fp32, {pass.experts, pass.out, pass.in});
  run(ops(level).outer, pass);
}

// Cumulative token counts of packed sequences, `tokens` together.
const std::int64_t* sequence_ends(const Array& ends, std::int64_t tokens) {
  const std::int64_t count = size(ends, 0);
  const auto* each = elements<std::int64_t>(ends, "ends", Type::int64, {count});
  std::int64_t before = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    if (each[i] <= before) throw std::invalid_argument("ends do not increase");
    before = each[i];
  }
  if (before != tokens) throw std::invalid_argument("ends do not reach the last token");
  return each;
}

CausalPass causal(const Array& q, const Array& k, const Array& v, const Array& ends, float scale, const Array& out,
                  const Array& log_total) {
  CausalPass pass;
  const std::int64_t tokens = size(q, 0);
  pass.heads = size(q, 1);
  pass.key_dim = size(q, 2);
  pass.kv_heads = size(k, 1);
  pass.value_dim = size(v, 2);
  pass.scale = scale;
  if (pass.kv_heads < 1 || pass.heads % pass.kv_heads != 0) throw std::invalid_argument("heads do not share key heads evenly");
  pass.sequences = size(ends, 0);
  pass.ends = sequence_ends(ends, tokens);
  pass.q = elements<bf16>(q, "q", Type::bf16, {tokens, pass.heads, pass.key_dim});
  pass.k = elements<bf16>(k, "k", Type::bf16, {tokens, pass.kv_heads, pass.key_dim});
  pass.v = elements<bf16>(v, "v", Type::bf16, {tokens, pass.kv_heads, pass.value_dim});
  pass.out = elements<bf16>(out, "out", Type::bf16, {tokens, pass.heads, pass.value_dim});
  pass.log_total = elements<float>(log_total, "log_total", Type::fp32, {tokens, pass.heads});
  return pass;
}

void causal_forward(const Array& q, const Array& k, const Array& v, const Array& ends, float scale, const Array& out,
                    const Array& log_total, const std::string& level) {
  run(ops(level).causal_forward, causal(q, k, v, ends, scale, out, log_total));
}

void causal_backward(const Array& q, const Array& k, const Array& v, const Array& ends, float scale, const Array& out,
                     const Array& log_total, const Array& grad, const Array& grad_q, const Array& grad_k,
                     const Array& grad_v, const std::string& level) {
  CausalPass pass = causal(q, k, v, ends, scale, out, log_total);
  const std::int64_t tokens = size(q, 0);
  pass.grad = elements<bf16>(grad, "grad", Type::bf16, {tokens, pass.heads, pass.value_dim});
  pass.grad_q = elements<bf16>(grad_q, "grad_q", Type::bf16, {tokens, pass.heads, pass.key_dim});
  pass.grad_k = elements<bf16>(grad_k, "grad_k", Type::bf16, {tokens, pass.kv_heads, pass.key_dim});
  pass.grad_v = elements<bf16>(grad_v, "grad_v", Type::bf16, {tokens, pass.kv_heads, pass.value_dim});
  run(ops(level).causal_backward, pass);
}

void indexer_loss(const Array& q, const Array& k, const Array& log_total, const Array& ends, float scale,
                  const Array& index_q, const Array& index_weights, const Array& index_k, std::int64_t topk, float weight,
                  const Array& kl, const Array& recall, const std::optional<Array>& grad_q,
                  const std::optional<Array>& grad_weights, const std::optional<Array>& grad_k,
                  const std::optional<Array>& v, const std::optional<Array>& out, const std::string& level) {
  IndexerPass pass;
  const std::int64_t tokens = size(q, 0);
  pass.heads = size(q, 1);
  pass.key_dim = size(q, 2);
  pass.kv_heads = size(k, 1);
  if (pass.kv_heads < 1 || pass.heads % pass.kv_heads != 0) throw std::invalid_argument("heads do not share key heads evenly");
  pass.index_heads = size(index_q, 1);
  pass.index_dim = size(index_q, 2);
  if (topk < 1 || pass.index_heads < 1 || pass.index_dim < 1) throw std::invalid_argument("topk and sizes of the indexer must be positive");
  pass.topk = topk;
  pass.scale = scale;
  pass.index_scale = 1 / std::sqrt(static_cast<float>(pass.index_dim));
  pass.weight = weight;
  pass.sequences = size(ends, 0);
  pass.ends = sequence_ends(ends, tokens);
  pass.q = elements<bf16>(q, "q", Type::bf16, {tokens, pass.heads, pass.key_dim});
  pass.k = elements<bf16>(k, "k", Type::bf16, {tokens, pass.kv_heads, pass.key_dim});
  pass.log_total = elements<float>(log_total, "log_total", Type::fp32, {tokens, pass.heads});
  pass.index_q = elements<bf16>(index_q, "index_q", Type::bf16, {tokens, pass.index_heads, pass.index_dim});
  pass.index_weights = elements<float>(index_weights, "index_weights", Type::fp32, {tokens, pass.index_heads});
  pass.index_k = elements<bf16>(index_k, "index_k", Type::bf16, {tokens, pass.index_dim});
  pass.kl = elements<float>(kl, "kl", Type::fp32, {tokens});
  pass.recall = elements<float>(recall, "recall", Type::fp32, {tokens});
  if (grad_q) {
    if (!grad_weights || !grad_k) throw std::invalid_argument("grad_q needs grad_weights and grad_k");
    pass.grad_q = elements<bf16>(*grad_q, "grad_q", Type::bf16, {tokens, pass.index_heads, pass.index_dim});
    pass.grad_weights = elements<float>(*grad_weights, "grad_weights", Type::fp32, {tokens, pass.index_heads});
    pass.grad_k = elements<bf16>(*grad_k, "grad_k", Type::bf16, {tokens, pass.index_dim});
  }
  if (out) {
    if (!v) throw std::invalid_argument("out needs v");
    pass.value_dim = size(*v, 2);
    pass.v = elements<bf16>(*v, "v", Type::bf16, {tokens, pass.kv_heads, pass.value_dim});
    pass.out = elements<bf16>(*out, "out", Type::bf16, {tokens, pass.heads, pass.value_dim});
  }
  Buffer panels, sums;
  pass.panels = &panels;
  pass.sums = &sums;
  run(ops(level).indexer_loss, pass);
}

}  // namespace

void bind_training(nb::module_& module) {
  module.def("norm_pieces", [](std::int64_t rows) { return (rows + kNormPiece - 1) / kNormPiece; }, "rows"_a);
  module.def("norm_forward", norm_forward, "x"_a, "weight"_a, "eps"_a, "out"_a, "inverse"_a, "level"_a = "");
  module.def("norm_backward", norm_backward, "x"_a, "weight"_a, "eps"_a, "inverse"_a, "grad"_a, "grad_x"_a,
             "grad_weight"_a, "partial"_a, "level"_a = "");
  module.def("gated_forward", gated_forward, "gate"_a, "up"_a, "inner"_a, "level"_a = "");
  module.def("gated_backward", gated_backward, "gate"_a, "up"_a, "grad"_a, "factors"_a.none(),
             "inner"_a.none(), "grad_gate"_a, "grad_up"_a, "grad_factors"_a.none(), "level"_a = "");
  module.def("entropy", entropy, "logits"_a, "targets"_a, "counted"_a, "z_weight"_a, "nll"_a, "z"_a, "level"_a = "");
  module.def("divergence", divergence, "logits"_a, "teacher"_a, "targets"_a, "counted"_a, "nll_weight"_a,
             "wants_gradient"_a, "kl"_a, "nll"_a, "level"_a = "");
  module.def("rotation", rotation, "x"_a, "cos"_a, "sin"_a, "interleave"_a, "is_inverse"_a, "out"_a, "level"_a = "");
  module.def("causal_forward", causal_forward, "q"_a, "k"_a, "v"_a, "ends"_a, "scale"_a, "out"_a, "log_total"_a,
             "level"_a = "");
  module.def("causal_backward", causal_backward, "q"_a, "k"_a, "v"_a, "ends"_a, "scale"_a, "out"_a, "log_total"_a,
             "grad"_a, "grad_q"_a, "grad_k"_a, "grad_v"_a, "level"_a = "");
  module.def("indexer_loss", indexer_loss, "q"_a, "k"_a, "log_total"_a, "ends"_a, "scale"_a, "index_q"_a,
             "index_weights"_a, "index_k"_a, "topk"_a, "weight"_a, "kl"_a, "recall"_a, "grad_q"_a.none(),
             "grad_weights"_a.none(), "grad_k"_a.none(), "v"_a.none() = nb::none(), "out"_a.none() = nb::none(),
             "level"_a = "");
  module.def("grouped", grouped, "rows"_a, "weight"_a, "counts"_a, "is_transposed"_a, "products"_a, "level"_a = "");
  module.def("outer", outer, "left"_a, "right"_a, "counts"_a, "sums"_a, "level"_a = "");
  module.def("combine", combine, "rows"_a, "factors"_a.none(), "places"_a, "out"_a, "level"_a = "");
}

}  // namespace lowlat
