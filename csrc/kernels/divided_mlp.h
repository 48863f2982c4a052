// SwiGLU MLP and mixture of experts divided among processes: rows of the dense or shared MLP by tensor parallelism, whole
// experts by expert parallelism. Every process sums the experts' gathered outputs in order of their number.
#pragma once

#include "divided.h"
#include "mlp.h"

namespace lowlat::LOWLAT_ISA {

// The MLP of all tokens: dense, or the shared experts. Null: none.
inline const ExpertRows* plain_rows(const Workspace& work) {
  if (work.expert_rows.empty() || work.expert_rows.back().is_routed) return nullptr;
  return &work.expert_rows.back();
}

// Outputs in bf16 of some MLPs of the work list, those of row r at out + (e.sent + r) * stride.
inline void make_outputs(const Pass& pass, const ExpertRows* begin, const ExpertRows* end, bf16* out,
                         std::int64_t stride) {
  std::int64_t strips = 0;
  for (const ExpertRows* e = begin; e < end; ++e) strips += num_strips(e->mlp->down.weight);
  pass.each_in_turn(strips, [&](std::int64_t strip, bool continues) {
    const ExpertRows* e = begin;
    while (strip >= num_strips(e->mlp->down.weight)) strip -= num_strips((e++)->mlp->down.weight);
    const Matrix& down = e->mlp->down.weight;
    Activations inner = pass.work.inner.from(e->first);
    inner.rows = e->rows;
    float* products = pass.strip_out(e->rows);
    const bool is_last = strip + 1 == num_strips(down);
    multiply_strip(down, strip, inner, pass.panels(down), products, next_strip(down, strip, continues && !is_last));
    add_expert_updates(pass, *e, e->mlp->down, strip, false, products);
    each_half(strip, down.rows, [&](std::int64_t column, int lane, std::int64_t count) {
      store_lanes(products + lane, nullptr, count, e->rows, out + e->sent * stride + column, stride);
    });
  });
}

// The outputs of the routed experts of all processes; returns those of each routed row.
struct RoutedOutputs {
  const bf16* values = nullptr;  // [processes, most rows, hidden]
  std::int64_t most = 0;
};

inline RoutedOutputs gather_routed(const Pass& pass) {
  Workspace& work = pass.work;
  const Division& division = pass.model.division;
  const std::int64_t hidden = pass.model.hidden;
  const std::int64_t most = *std::max_element(work.rank_rows.begin(), work.rank_rows.end());
  bf16* own = begin_exchange<bf16>(pass, most * hidden);
  const ExpertRows* begin = work.expert_rows.data();
  const ExpertRows* end = begin + work.expert_rows.size() - (plain_rows(work) == nullptr ? 0 : 1);
  make_outputs(pass, begin, end, own, hidden);
  return {exchange<bf16>(pass, DivisionGroup::expert, division.experts, most * hidden), most};
}

// The output of the dense or shared MLP of all tokens into work.added.
inline void gather_plain(const Pass& pass, const ExpertRows& plain) {
  Workspace& work = pass.work;
  const std::int64_t hidden = pass.model.hidden, rows = plain.mlp->down.weight.rows;
  if (pass.model.division.tensor == 1) return make_outputs(pass, &plain, &plain + 1, work.added, hidden);
  bf16* own = begin_exchange<bf16>(pass, plain.rows * rows);
  make_outputs(pass, &plain, &plain + 1, own, rows);
  exchange_columns(pass, plain.rows, rows, work.added, hidden);
}

// One strip of the residual stream, as add_down_strip() computes it.
inline void add_outputs_strip(const Pass& pass, const Layer& layer, const RoutedOutputs& routed, bool has_plain,
                              std::int64_t strip) {
  Workspace& work = pass.work;
  const std::int64_t tokens = pass.step.tokens, hidden = pass.model.hidden;
  const F scale = set1(pass.model.residual_scale);
  float* sums = pass.strip_out(tokens, 1);
  std::memset(sums, 0, tokens * kStrip * sizeof(float));
  for (std::int64_t row = 0; routed.values != nullptr && row < work.routed; ++row) {
    const RowPlace place = work.row_places[row];
    const bf16* y = routed.values + (place.rank * routed.most + place.number) * hidden;
    float* sum = sums + work.row_token[row] * kStrip;
    const F weight = set1(work.row_weight[row]);
    each_half(strip, hidden, [&](std::int64_t column, int lane, std::int64_t count) {
      store(sum + lane, fma(load_bf16(y + column, count), weight, load(sum + lane)));
    });
  }
  each_half(strip, hidden, [&](std::int64_t column, int lane, std::int64_t count) {
    for (std::int64_t t = 0; t < tokens; ++t) {
      F y = has_plain ? load_bf16(work.added + t * hidden + column, count) : zero();
      if (routed.values != nullptr) y = rounded(add(rounded(load(sums + t * kStrip + lane)), y));
      if (layer.post_mlp_norm) {
        store_bf16(work.hidden.values + t * work.hidden.stride + column, y, count);
        continue;
      }
      bf16* x = work.x + t * work.hidden.stride + column;
      store_bf16(x, add(load_bf16(x, count), rounded(mul(y, scale))), count);
    }
  });
}

// x += MLP or MoE (norm x) after the inner rows of this process's MLPs are made.
inline void add_divided_mlp(const Pass& pass, const Layer& layer) {
  Workspace& work = pass.work;
  const ExpertRows* plain = plain_rows(work);
  if (plain != nullptr && pass.model.division.tensor > 1) {
    Activations inner = work.inner.from(plain->first);
    inner.rows = plain->rows;
    gather_columns(pass, inner, plain->mlp->gate.weight.rows, inner);
  }
  shrink_expert_rows(pass, true);
  if (plain != nullptr) gather_plain(pass, *plain);
  const RoutedOutputs routed = layer.moe ? gather_routed(pass) : RoutedOutputs{};
  pass.each((pass.model.hidden + kStrip - 1) / kStrip,
            [&](std::int64_t strip) { add_outputs_strip(pass, layer, routed, plain != nullptr, strip); });
  if (layer.post_mlp_norm) add_normalized(pass, *layer.post_mlp_norm);
}

}  // namespace lowlat::LOWLAT_ISA
