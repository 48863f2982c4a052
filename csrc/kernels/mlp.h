// SwiGLU MLP and mixture of experts. The dense MLP, the shared and the routed experts form one list of (MLP, rows):
// gate, up and SiLU give the inner rows, then every output tile sums all MLPs in order.
#pragma once

#include "phases.h"
#include "routing.h"

namespace lowlat::LOWLAT_ISA {

// The rows an MLP reads.
inline Activations inputs_of(const Pass& pass, const ExpertRows& e) {
  const Workspace& work = pass.work;
  Activations x = e.is_routed && work.gathered.values != nullptr ? work.gathered.from(e.first) : work.hidden;
  x.rows = e.rows;
  return x;
}

// Divides the rows of every expert among its places; work.next_row has the first row of every expert.
inline void place_rows(const Pass& pass, const Moe& moe) {
  Workspace& work = pass.work;
  const std::int64_t experts = moe.router.experts, own = static_cast<std::int64_t>(moe.experts.size());
  const bool has_replicas = static_cast<std::int64_t>(moe.places.size()) > experts;
  if (pass.model.division.is_whole() && !has_replicas) {
    for (std::int64_t e = 0; e < experts; ++e) {
      const std::int64_t first = work.next_row[e], end = e + 1 < experts ? work.next_row[e + 1] : work.routed;
      if (end > first) work.expert_rows.push_back({&moe.experts[e], first, end - first, true});
    }
    return;
  }
  work.replicas.assign(experts, 0);
  work.replica.assign(experts, 0);
  for (const std::int32_t e : moe.places) ++work.replicas[e];
  work.rank_rows.assign(moe.places.size() / own, 0);
  for (std::size_t place = 0; place < moe.places.size(); ++place) {
    const std::int32_t e = moe.places[place];
    const std::int64_t rank = static_cast<std::int64_t>(place) / own, count = work.replicas[e];
    const std::int64_t begin = work.next_row[e], end = e + 1 < experts ? work.next_row[e + 1] : work.routed;
    // Remainders of different experts go to different replicas.
    const auto edge = [&](std::int64_t number) {
      return number == count ? end : begin + ((end - begin) * number + (number > 0 ? e % count : 0)) / count;
    };
    const std::int64_t first = edge(work.replica[e]), rows = edge(++work.replica[e]) - first;
    for (std::int64_t r = 0; r < rows; ++r) work.row_places[first + r] = {rank, work.rank_rows[rank] + r};
    if (rows > 0 && rank == pass.model.division.expert_rank) {
      work.expert_rows.push_back({&moe.experts[place % own], first, rows, true, work.rank_rows[rank]});
    }
    work.rank_rows[rank] += rows;
  }
}

// Adds the rows of every expert to its load.
inline void count_loads(const Pass& pass, const Layer& layer) {
  Workspace& work = pass.work;
  std::int64_t* loads = work.loads.data() + (&layer - pass.model.layers.data()) * work.experts();
  const std::int64_t experts = layer.moe->router.experts;
  for (std::int64_t e = 0; e < experts; ++e) {
    loads[e] += (e + 1 < experts ? work.next_row[e + 1] : work.routed) - work.next_row[e];
  }
}

// The work list of a layer: routed experts by number, an expert's rows by token.
inline void group_rows(const Pass& pass, const Layer& layer) {
  Workspace& work = pass.work;
  const std::int64_t tokens = pass.step.tokens;
  work.expert_rows.clear();
  work.inner = layer.moe ? work.moe_inner : work.dense_inner;
  std::int64_t routed = 0;
  if (layer.moe) {
    const Router& router = layer.moe->router;
    for (std::int64_t e = 0; e < router.experts; ++e) work.next_row[e] = 0;
    for (std::int64_t i = 0; i < tokens * router.chosen; ++i) ++work.next_row[work.chosen[i]];
    for (std::int64_t e = 0; e < router.experts; ++e) {
      routed += work.next_row[e];
      work.next_row[e] = routed - work.next_row[e];
    }
    work.routed = routed;
    if (!work.loads.empty()) count_loads(pass, layer);
    place_rows(pass, *layer.moe);
    for (std::int64_t i = 0; i < tokens * router.chosen; ++i) {
      const std::int64_t row = work.next_row[work.chosen[i]]++;
      work.row_token[row] = static_cast<std::int32_t>(i / router.chosen);
      work.row_weight[row] = work.weights[i];
    }
  }
  if (layer.mlp) work.expert_rows.push_back({&*layer.mlp, routed, tokens, false});
}

inline void gather_rows(const Pass& pass) {
  const Workspace& work = pass.work;
  const Activations &from = work.hidden, &to = work.gathered;
  const Division& division = pass.model.division;
  pass.each(work.routed, [&](std::int64_t row) {
    if (division.experts > 1 && work.row_places[row].rank != division.expert_rank) return;
    const std::int64_t token = work.row_token[row];
    std::memcpy(to.values + row * to.stride, from.values + token * from.stride, from.stride * sizeof(bf16));
  });
}

// The token of row r of an MLP's rows.
inline std::int64_t token_of(const Pass& pass, const ExpertRows& e, std::int64_t r) {
  return e.is_routed ? pass.work.row_token[e.first + r] : r;
}

// x A^T of every row of the MLPs for the updates of gate and up, or of down: of row `row` at 2 * row of work.shrunk,
// that of up at 2 * row + 1.
inline void shrink_expert_rows(const Pass& pass, bool is_down) {
  const Workspace& work = pass.work;
  bool any = false;
  for (const ExpertRows& e : work.expert_rows) {
    const Mlp& mlp = *e.mlp;
    any |= is_down ? updates_any(pass, mlp.down.updates)
                   : updates_any(pass, mlp.gate.updates) || updates_any(pass, mlp.up.updates);
  }
  if (!any) return;
  const ExpertRows& last = work.expert_rows.back();
  pass.each(last.first + last.rows, [&](std::int64_t row) {
    const ExpertRows* e = work.expert_rows.data();
    if (row < e->first) return;  // of another process
    while (row >= e->first + e->rows) ++e;
    if (row < e->first) return;
    const Activations x = is_down ? work.inner.from(e->first) : inputs_of(pass, *e);
    const auto shrink_one = [&](const Projection& p, std::int64_t to) {
      const LowRank* update = update_of(pass, p.updates, token_of(pass, *e, row - e->first));
      if (update == nullptr) return;
      shrink(x.values + (row - e->first) * x.stride, p.weight.columns, update->a, update->a_stride, update->rank,
             shrunk_row(pass, to));
    };
    if (is_down) return shrink_one(e->mlp->down, 2 * row);
    shrink_one(e->mlp->gate, 2 * row);
    shrink_one(e->mlp->up, 2 * row + 1);
  });
}

// Adds the updates of an MLP's rows to a strip of a projection; `is_up` as in shrink_expert_rows().
inline void add_expert_updates(const Pass& pass, const ExpertRows& e, const Projection& projection, std::int64_t strip,
                               bool is_up, float* out) {
  add_updates(pass, projection.updates, strip * kStrip, e.rows, out,
              [&](std::int64_t r) { return token_of(pass, e, r); },
              [&](std::int64_t r) { return 2 * (e.first + r) + (is_up ? 1 : 0); });
}

// silu(gate x) * up x for one strip of an MLP's inner channels; `next` is prefetched.
inline void make_inner_strip(const Pass& pass, const ExpertRows& e, std::int64_t strip, NextTile next) {
  const Activations x = inputs_of(pass, e);
  const Matrix &gate = e.mlp->gate.weight, &up = e.mlp->up.weight;
  float* g = pass.strip_out(e.rows, 0);
  float* u = pass.strip_out(e.rows, 1);
  Panel* panels = pass.panels(gate);
  multiply_strip(gate, strip, x, panels, g, {&up, 2 * strip});
  multiply_strip(up, strip, x, panels, u, next);
  add_expert_updates(pass, e, e.mlp->gate, strip, false, g);
  add_expert_updates(pass, e, e.mlp->up, strip, true, u);
  const Activations inner = pass.work.inner.from(e.first);
  each_half(strip, gate.rows, [&](std::int64_t column, int lane, std::int64_t count) {
    for (std::int64_t r = 0; r < e.rows; ++r) {
      const F value = swiglu(rounded(load(g + r * kStrip + lane)), rounded(load(u + r * kStrip + lane)));
      store_bf16(inner.values + r * inner.stride + column, value, count);
    }
  });
  if (strip + 1 < num_strips(gate)) return;
  for (std::int64_t r = 0; r < e.rows; ++r) pad_row(inner.values + r * inner.stride, gate.rows);
}

inline void make_inner_rows(const Pass& pass) {
  const Workspace& work = pass.work;
  shrink_expert_rows(pass, false);
  std::int64_t strips = 0;
  for (const ExpertRows& e : work.expert_rows) strips += num_strips(e.mlp->gate.weight);
  pass.each_in_turn(strips, [&](std::int64_t strip, bool continues) {
    const ExpertRows* e = work.expert_rows.data();
    while (strip >= num_strips(e->mlp->gate.weight)) strip -= num_strips((e++)->mlp->gate.weight);
    const bool is_last = strip + 1 == num_strips(e->mlp->gate.weight);
    const NextTile next = continues && is_last ? NextTile{&(e + 1)->mlp->gate.weight, 0}
                                             : next_strip(e->mlp->gate.weight, strip, continues);
    make_inner_strip(pass, *e, strip, next);
  });
}

// One strip of the residual stream: adds the weighted sum of the routed experts and the shared or dense MLP. With a
// norm of that sum, the strip goes to work.hidden instead.
inline void add_down_strip(const Pass& pass, const Layer& layer, std::int64_t strip, bool continues) {
  Workspace& work = pass.work;
  const F scale = set1(pass.model.residual_scale);
  const std::int64_t tokens = pass.step.tokens;
  float* sums = pass.strip_out(tokens, 1);
  float* plain = nullptr;
  bool is_routed = false;
  std::memset(sums, 0, tokens * kStrip * sizeof(float));
  for (const ExpertRows& e : work.expert_rows) {
    const Matrix& down = e.mlp->down.weight;
    Activations inner = work.inner.from(e.first);
    inner.rows = e.rows;
    float* out = pass.strip_out(e.rows, 0);
    const bool is_last = &e == &work.expert_rows.back();
    const NextTile next = is_last ? next_strip(work.expert_rows.front().mlp->down.weight, strip, continues)
                                  : NextTile{&(&e + 1)->mlp->down.weight, 2 * strip};
    multiply_strip(down, strip, inner, pass.panels(down), out, next);
    add_expert_updates(pass, e, e.mlp->down, strip, false, out);
    if (!e.is_routed) {
      plain = out;
      continue;
    }
    is_routed = true;
    for (std::int64_t r = 0; r < e.rows; ++r) {
      float* sum = sums + work.row_token[e.first + r] * kStrip;
      const F weight = set1(work.row_weight[e.first + r]);
      for (int lane = 0; lane < kStrip; lane += kTile) {
        store(sum + lane, fma(rounded(load(out + r * kStrip + lane)), weight, load(sum + lane)));
      }
    }
  }
  each_half(strip, pass.model.hidden, [&](std::int64_t column, int lane, std::int64_t count) {
    for (std::int64_t t = 0; t < tokens; ++t) {
      F y = zero();
      if (plain != nullptr) y = rounded(load(plain + t * kStrip + lane));
      if (is_routed) y = rounded(add(rounded(load(sums + t * kStrip + lane)), y));
      if (layer.post_mlp_norm) {
        store_bf16(work.hidden.values + t * work.hidden.stride + column, y, count);
        continue;
      }
      bf16* x = work.x + t * work.hidden.stride + column;
      store_bf16(x, add(load_bf16(x, count), rounded(mul(y, scale))), count);
    }
  });
}

// x += norm y, for the output y of the MLP in work.hidden.
inline void add_normalized(const Pass& pass, const Norm& norm) {
  const Workspace& work = pass.work;
  pass.each_token([&](std::int64_t t) {
    bf16* y = work.hidden.values + t * work.hidden.stride;
    bf16* x = work.x + t * work.hidden.stride;
    rms_norm(norm, y, y);
    for (std::int64_t i = 0; i < norm.size; i += 16) {
      const std::int64_t left = norm.size - i;
      store_bf16(x + i, add(load_bf16(x + i, left), load_bf16(y + i, left)), left);
    }
  });
}

inline void choose_experts(const Pass& pass, const Router& router) {
  const Workspace& work = pass.work;
  pass.each(num_strips(router.weight), [&](std::int64_t strip) {
    float* out = pass.strip_out(pass.step.tokens);
    multiply_strip(router.weight, strip, work.hidden, pass.panels(router.weight), out);
    const std::int64_t first = strip * kStrip, count = least(kStrip, router.experts - first);
    for (std::int64_t t = 0; t < pass.step.tokens; ++t) {
      std::memcpy(work.gate_scores + t * router.experts + first, out + t * kStrip, count * sizeof(float));
    }
  });
  pass.each_token([&](std::int64_t t) {
    float* scores = work.gate_scores + t * router.experts;
    gate_scores(router, scores);
    choose(router, scores, pass.scratch.get<float>(0, choose_scratch(router)), work.chosen + t * router.chosen,
           work.weights + t * router.chosen);
  });
}

// The layer's routing into step.experts and step.gates.
inline void keep_routing(const Pass& pass, const Layer& layer) {
  if (!layer.moe || pass.step.experts == nullptr) return;
  const std::int64_t count = pass.step.tokens * layer.moe->router.chosen;
  const std::int64_t first = (&layer - pass.model.layers.data()) * count;
  std::memcpy(pass.step.experts + first, pass.work.chosen, count * sizeof(std::int32_t));
  std::memcpy(pass.step.gates + first, pass.work.weights, count * sizeof(float));
}

// The inner rows of the layer's MLPs over the normalized residual stream.
inline void make_mlp_rows(const Pass& pass, const Layer& layer) {
  norm_residual(pass, layer.post_attention_norm);
  if (layer.moe) choose_experts(pass, layer.moe->router);
  pass.once([&] {
    keep_routing(pass, layer);
    group_rows(pass, layer);
    if (!pass.model.is_larger_than_memory) return;
    for (const ExpertRows& e : pass.work.expert_rows) {
      if (e.is_routed) read_ahead(*e.mlp);
    }
  });
  if (layer.moe && pass.step.tokens > 1) gather_rows(pass);
  make_inner_rows(pass);
}

// x += MLP or MoE (norm x), times residual_scale or normalized.
inline void add_mlp(const Pass& pass, const Layer& layer) {
  make_mlp_rows(pass, layer);
  shrink_expert_rows(pass, true);
  pass.each_in_turn((pass.model.hidden + kStrip - 1) / kStrip,
                    [&](std::int64_t strip, bool continues) { add_down_strip(pass, layer, strip, continues); });
  if (layer.post_mlp_norm) add_normalized(pass, *layer.post_mlp_norm);
}

}  // namespace lowlat::LOWLAT_ISA
