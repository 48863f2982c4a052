// Phases of a step: linear layers with LoRA updates, bias and residual; norms.
#pragma once

#include <initializer_list>

#include "../readahead.h"
#include "low_rank.h"
#include "kv_cache.h"
#include "rowwise.h"

namespace lowlat::LOWLAT_ISA {

// Zeros from `columns` to the next multiple of 32, which the GEMM reads.
inline void pad_row(bf16* row, std::int64_t columns) {
  std::memset(row + columns, 0, (round_up(columns, kGroup) - columns) * sizeof(bf16));
}

// The first `width` channels of a head's queries, zero-padded to a multiple of 32: in place if `width` is one, else
// in `slot` of the scratch. The memory behind them may hold another request's values, whose NaN would survive a
// weight of 0.
inline Activations rows_of_head(const Pass& pass, const Attention& a, std::int64_t head, std::int64_t first,
                                std::int64_t tokens, std::int64_t width, int slot) {
  Activations q;
  q.rows = tokens;
  q.stride = a.heads * a.query_dim();
  q.values = pass.work.q + (first * a.heads + head) * a.query_dim();
  const std::int64_t stride = round_up(width, kColumns);
  if (width == stride) return q;
  auto* padded = pass.scratch.get<bf16>(slot, tokens * stride);
  copy_rows(q.values, q.stride, tokens, width, padded);
  q.stride = stride;
  q.values = padded;
  return q;
}

// body(column, lane, count) for each 16 lanes of a strip that hold columns of a result `width` wide.
template <class Body>
inline void each_half(std::int64_t strip, std::int64_t width, Body&& body) {
  for (int lane = 0; lane < kStrip; lane += kTile) {
    const std::int64_t column = strip * kStrip + lane;
    if (column < width) body(column, lane, least(kTile, width - column));
  }
}

// 16 lanes of y = out + bias as bf16, for all rows.
inline void store_lanes(const float* out, const float* bias, std::int64_t count, std::int64_t rows, bf16* y,
                        std::int64_t stride) {
  const F b = bias == nullptr ? zero() : load(bias, count);
  for (std::int64_t r = 0; r < rows; ++r) store_bf16(y + r * stride, add(load(out + r * kStrip), b), count);
}

// y = x W^T + b, in bf16.
struct Product {
  const Projection* projection;
  const Activations* x;
  bf16* y;
  std::int64_t stride;
};

// x A^T of every token for the updates of several linear layers; product p's begin at row p * tokens of work.shrunk.
inline void shrink_all(const Pass& pass, std::initializer_list<Product> products) {
  std::int64_t updated = 0;
  for (const Product& p : products) updated += updates_any(pass, p.projection->updates) ? 1 : 0;
  if (updated == 0) return;
  const std::int64_t tokens = pass.step.tokens;
  pass.each(static_cast<std::int64_t>(products.size()) * tokens, [&](std::int64_t item) {
    const Product& p = products.begin()[item / tokens];
    const std::int64_t token = item % tokens;
    const LowRank* update = update_of(pass, p.projection->updates, token);
    if (update == nullptr) return;
    shrink(p.x->values + token * p.x->stride, p.projection->weight.columns, update->a, update->a_stride, update->rank,
           shrunk_row(pass, item));
  });
}

// Adds the updates of all tokens to a strip of product number `index` of shrink_all().
inline void add_token_updates(const Pass& pass, const Projection& projection, std::int64_t strip, std::int64_t index,
                              float* out) {
  const std::int64_t tokens = pass.step.tokens;
  add_updates(pass, projection.updates, strip * kStrip, tokens, out, [](std::int64_t r) { return r; },
              [&](std::int64_t r) { return index * tokens + r; });
}

// Several linear layers at once: their strips form one work list.
inline void multiply_all(const Pass& pass, std::initializer_list<Product> products) {
  shrink_all(pass, products);
  std::int64_t strips = 0;
  for (const Product& p : products) strips += num_strips(p.projection->weight);
  pass.each_in_turn(strips, [&](std::int64_t strip, bool continues) {
    const Product* p = products.begin();
    while (strip >= num_strips(p->projection->weight)) strip -= num_strips((p++)->projection->weight);
    const Matrix& w = p->projection->weight;
    const float* bias = p->projection->bias;
    float* out = pass.strip_out(p->x->rows);
    multiply_strip(w, strip, *p->x, pass.panels(w), out, next_strip(w, strip, continues));
    add_token_updates(pass, *p->projection, strip, p - products.begin(), out);
    each_half(strip, w.rows, [&](std::int64_t column, int lane, std::int64_t count) {
      store_lanes(out + lane, bias == nullptr ? nullptr : bias + column, count, p->x->rows, p->y + column, p->stride);
    });
  });
}

// x += residual_scale * (y W^T + b) for the residual stream x.
inline void multiply_into_residual(const Pass& pass, const Projection& p, const Activations& y) {
  Workspace& work = pass.work;
  const F scale = set1(pass.model.residual_scale);
  shrink_all(pass, {{&p, &y, nullptr, 0}});
  pass.each_in_turn(num_strips(p.weight), [&](std::int64_t strip, bool continues) {
    float* out = pass.strip_out(y.rows);
    multiply_strip(p.weight, strip, y, pass.panels(p.weight), out, next_strip(p.weight, strip, continues));
    add_token_updates(pass, p, strip, 0, out);
    each_half(strip, p.weight.rows, [&](std::int64_t column, int lane, std::int64_t count) {
      const F bias = p.bias == nullptr ? zero() : load(p.bias + column, count);
      for (std::int64_t r = 0; r < y.rows; ++r) {
        bf16* x = work.x + r * work.hidden.stride + column;
        const F y = rounded(add(load(out + r * kStrip + lane), bias));
        store_bf16(x, add(load_bf16(x, count), rounded(mul(y, scale))), count);
      }
    });
  });
}

// RMSNorm of the residual stream into work.hidden.
inline void norm_residual(const Pass& pass, const Norm& norm) {
  const Workspace& work = pass.work;
  pass.each_token([&](std::int64_t t) {
    rms_norm(norm, work.x + t * work.hidden.stride, work.hidden.values + t * work.hidden.stride);
    pad_row(work.hidden.values + t * work.hidden.stride, norm.size);
  });
}

}  // namespace lowlat::LOWLAT_ISA
