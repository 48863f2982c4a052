// Attention block of a layer: projections, KV cache write, absorbed MLA decode, expanded MLA prefill, GQA, output
// projection.
#pragma once

#include "divided.h"
#include "expanded_mla.h"
#include "indexer_phases.h"
#include "low_rank_heads.h"
#include "phases.h"
#include "attention_tasks.h"

namespace lowlat::LOWLAT_ISA {

// Writes a token's KV cache entry of a layer.
inline void store_token(const Pass& pass, const Attention& a, const Cache& cache, std::int64_t token) {
  const bf16* row = pass.work.row + token * a.entry_dim();
  store_row(cache, row, a.entry_dim(), cache.data + pass.step.slots[token] * cache.row_bytes);
}

// body(first, tokens) for every run of tokens on the absorbed path.
template <class Body>
inline void each_absorbed(const Pass& pass, Body&& body) {
  for (const TokenRun& run : pass.work.absorbed) body(run.first, run.tokens);
}

inline void attend_all(const Pass& pass, const Attention& a, const Cache& cache) {
  const Workspace& work = pass.work;
  const auto expanded = static_cast<std::int64_t>(work.expanded.size()) * a.heads;
  const auto tasks = static_cast<std::int64_t>(work.tasks.size());
  pass.team.for_chunks(expanded + tasks, 1, [&](std::int64_t item, std::int64_t) {
    if (item < expanded) {
      expand_head(pass, a, cache, work.expanded[item / a.heads], item % a.heads);
    } else {
      run_attention_task(pass, a, cache, work.tasks[item - expanded]);
    }
  });
  fold_splits(pass, a);
}

// --- MLA ------------------------------------------------------------------------------------------------------------

// Clears padding that a wider layer may have left behind the token's queries and values of every head.
inline void clear_padding(const Pass& pass, const Attention& a, std::int64_t token) {
  const Workspace& work = pass.work;
  const RowView keys = row_view(a, 0);
  for (std::int64_t head = token * a.heads; head < (token + 1) * a.heads; ++head) {
    pad_row(work.absorbed_q + head * work.absorbed_stride + keys.key, keys.key_dim);
    pad_row(work.mixed + head * work.mixed_stride, a.latent_dim);
  }
  pad_row(work.attended.values + token * work.attended.stride, a.heads * a.value_dim);
}

inline void make_mla_rows(const Pass& pass, const Attention& a, const Cache& cache) {
  const Workspace& work = pass.work;
  pass.each_token([&](std::int64_t t) {
    if (a.q_a) {
      rms_norm(a.q_a_norm, work.query_latent_raw + t * work.query_latent.stride,
               work.query_latent.values + t * work.query_latent.stride);
      pad_row(work.query_latent.values + t * work.query_latent.stride, a.q_a_norm.size);
    }
    bf16* row = work.row + t * a.entry_dim();
    bf16* latent = row;
    for (const Norm& norm : a.kv_a_norms) {
      rms_norm(norm, latent, latent);
      latent += norm.size;
    }
    const Rotation turn = rotation_of(pass.step, a, t);
    rotate(row + a.latent_dim, a.rope_dim, turn.cos, turn.sin, a.interleave);
    store_token(pass, a, cache, t);
    clear_padding(pass, a, t);
  });
}

// Applies RoPE to the rotary part of every query head in place.
inline void rotate_queries(const Pass& pass, const Attention& a, std::int64_t head, std::int64_t token) {
  bf16* q = pass.work.q + (token * a.heads + head) * a.query_dim() + a.nope_dim;
  const Rotation turn = rotation_of(pass.step, a, token);
  rotate(q, a.rope_dim, turn.cos, turn.sin, a.interleave);
}

// NoPE queries of a head, rows `stride` apart. Row scales of W_UK are multiplied in.
inline Activations head_queries(const Pass& pass, const Attention& a, const Matrix& w, std::int64_t head,
                                std::int64_t first, std::int64_t tokens) {
  Activations q = rows_of_head(pass, a, head, first, tokens, w.rows, 3);
  if (!w.has_row_scales()) return q;
  const std::int64_t width = round_up(w.rows, 32);
  auto* scaled = pass.scratch.get<bf16>(4, tokens * width);
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t i = 0; i < w.rows; i += 16) {
      const F scale = load(static_cast<const float*>(w.scale) + i, w.rows - i);
      store_bf16(scaled + t * width + i, mul(load_bf16(q.values + t * q.stride + i, w.rows - i), scale), w.rows - i);
    }
    pad_row(scaled + t * width, w.rows);
  }
  q.stride = width;
  q.values = scaled;
  return q;
}

// Weight absorption: 32 latent channels of the query of a head, W_UK^T q^C, for all tokens on the absorbed path.
inline void absorb_query(const Pass& pass, const Attention& a, const Matrix& w, std::int64_t head, std::int64_t strip) {
  const Workspace& work = pass.work;
  const std::int64_t count = num_panels(w.rows);
  Panel* panels = pass.scratch.get<Panel>(2, 2 * count);
  load_transposed_panels(w, strip * kStrip, 0, w.rows, panels, count, true);
  each_absorbed(pass, [&](std::int64_t first, std::int64_t tokens) {
    const Activations q = head_queries(pass, a, w, head, first, tokens);
    float* out = pass.strip_out(tokens);
    multiply(panels, 2, count, count, q.values, q.stride, tokens, out, kStrip, false);
    add_query_updates(pass, a, head, strip * kStrip, first, tokens, out);
    each_half(strip, a.latent_dim, [&](std::int64_t channel, int lane, std::int64_t width) {
      bf16* to = work.absorbed_q + (first * a.heads + head) * work.absorbed_stride + channel;
      store_lanes(out + lane, nullptr, width, tokens, to, a.heads * work.absorbed_stride);
    });
  });
}

// absorb_query for W_UK stored transposed: its rows are latent channels.
inline void absorb_transposed(const Pass& pass, const Attention& a, const Matrix& w, std::int64_t head, std::int64_t strip,
                              NextTile next) {
  const Workspace& work = pass.work;
  each_absorbed(pass, [&](std::int64_t first, std::int64_t tokens) {
    Activations q = rows_of_head(pass, a, head, first, tokens, w.columns, 3);
    q.is_decode = pass.step.is_decode;
    float* out = pass.strip_out(tokens);
    multiply_strip(w, strip, q, pass.panels(w), out, next);
    add_query_updates(pass, a, head, strip * kStrip, first, tokens, out);
    each_half(strip, a.latent_dim, [&](std::int64_t channel, int lane, std::int64_t width) {
      bf16* to = work.absorbed_q + (first * a.heads + head) * work.absorbed_stride + channel;
      store_lanes(out + lane, nullptr, width, tokens, to, a.heads * work.absorbed_stride);
    });
  });
}

// Whether the step absorbs a single token, with widths and weights that absorb_one_query() supports.
inline bool absorbs_one(const Pass& pass, const Attention& a) {
  const Storage storage = a.kv_b.storage;
  const bool is_plain = storage == Storage::bf16 || storage == Storage::int8_rows || storage == Storage::gguf;
  return kMultipliesByDots && is_plain && !a.k_b && pass.step.tokens == 1 && a.nope_dim % 32 == 0 && a.latent_dim % 32 == 0;
}

// The absorbed query of a head for the step's only token (GEMV).
inline void absorb_one_query(const Pass& pass, const Attention& a, const Matrix& w, std::int64_t head) {
  const bf16* q = head_queries(pass, a, w, head, 0, 1).values;
  auto* out = pass.scratch.get<float>(2, 2 * a.latent_dim);
  if (w.storage == Storage::bf16) {
    multiply_transposed<Storage::bf16>(w, q, out, out + a.latent_dim);
  } else {
    multiply_transposed<Storage::int8_rows>(w, q, out, out + a.latent_dim);
  }
  for (std::int64_t c = 0; c < a.latent_dim; c += kStrip) add_query_updates(pass, a, head, c, 0, 1, out + c);
  bf16* to = pass.work.absorbed_q + head * pass.work.absorbed_stride;
  for (std::int64_t c = 0; c < a.latent_dim; c += kTile) store_bf16(to + c, load(out + c));
}

// Applies RoPE to the rotary part of a head's queries and copies it behind the absorbed part.
inline void finish_rotary_query(const Pass& pass, const Attention& a, std::int64_t head) {
  const Workspace& work = pass.work;
  for (std::int64_t t = 0; t < pass.step.tokens; ++t) rotate_queries(pass, a, head, t);
  each_absorbed(pass, [&](std::int64_t first, std::int64_t tokens) {
    for (std::int64_t t = first; t < first + tokens; ++t) {
      const bf16* from = work.q + (t * a.heads + head) * a.query_dim() + a.nope_dim;
      bf16* to = work.absorbed_q + (t * a.heads + head) * work.absorbed_stride + a.latent_dim;
      std::memcpy(to, from, a.rope_dim * sizeof(bf16));
    }
  });
}

inline void make_mla_queries(const Pass& pass, const Attention& a) {
  const bool absorbs = a.nope_dim > 0 && !pass.work.absorbed.empty(), is_one = absorbs && absorbs_one(pass, a);
  const std::int64_t strips = (a.latent_dim + kStrip - 1) / kStrip;
  // GGUF blocks are decoded once per head.
  const bool by_heads = is_one || a.k_b || a.kv_b.storage == Storage::gguf;
  const std::int64_t blocks = 1 + (by_heads && absorbs ? 1 : absorbs ? strips : 0);
  pass.each_in_turn(a.heads * blocks, [&](std::int64_t item, bool continues) {
    const std::int64_t head = item / blocks, block = item % blocks;
    if (block == 0) return finish_rotary_query(pass, a, head);
    Matrix w = key_projection(a, head);
    if (a.k_b) {
      const Matrix follows = continues ? key_projection(a, head + 1) : w;
      for (std::int64_t strip = 0; strip < strips; ++strip) {
        const NextTile next = strip + 1 < strips ? next_strip(w, strip, true) : next_strip(follows, -1, continues);
        absorb_transposed(pass, a, w, head, strip, next);
      }
      return;
    }
    if (w.storage == Storage::gguf) w = dense_copy(pass, w);
    if (is_one) return absorb_one_query(pass, a, w, head);
    const std::int64_t first = by_heads ? 0 : block - 1, last = by_heads ? strips : block;
    for (std::int64_t strip = first; strip < last; ++strip) absorb_query(pass, a, w, head, strip);
  });
}

// Values of a head from the attended latent, W_UV times it, for all tokens on the absorbed path.
inline void make_head_values(const Pass& pass, const Attention& a, std::int64_t head, std::int64_t strip,
                             bool continues) {
  const Workspace& work = pass.work;
  const Matrix w = value_projection(a, head);
  const bool is_last = strip + 1 == num_strips(w);
  const Matrix follows = is_last && continues ? value_projection(a, head + 1) : w;
  const NextTile next = is_last ? next_strip(follows, -1, continues) : next_strip(w, strip, continues);
  each_absorbed(pass, [&](std::int64_t first, std::int64_t tokens) {
    Activations x;
    x.rows = tokens;
    x.is_decode = pass.step.is_decode;
    x.stride = a.heads * work.mixed_stride;
    x.values = work.mixed + (first * a.heads + head) * work.mixed_stride;
    float* out = pass.strip_out(tokens);
    multiply_strip(w, strip, x, pass.panels(w), out, next);
    add_value_updates(pass, a, head, strip * kStrip, first, tokens, out);
    each_half(strip, a.value_dim, [&](std::int64_t column, int lane, std::int64_t count) {
      bf16* to = work.attended.values + first * work.attended.stride + head * a.value_dim + column;
      store_lanes(out + lane, nullptr, count, tokens, to, work.attended.stride);
    });
  });
}

inline void attend_mla(const Pass& pass, const Attention& a, const Cache& cache, const IndexCache& index_cache) {
  const Workspace& work = pass.work;
  const std::int64_t q_stride = a.heads * a.query_dim();
  const Product rows{&a.kv_a, &work.hidden, work.row, a.entry_dim()};
  if (a.q_a) {
    multiply_all(pass, {{&*a.q_a, &work.hidden, work.query_latent_raw, work.query_latent.stride}, rows});
  } else {
    multiply_all(pass, {{&a.q, &work.hidden, work.q, q_stride}, rows});
  }
  make_mla_rows(pass, a, cache);
  if (a.q_a) multiply_all(pass, {{&a.q, &work.query_latent, work.q, q_stride}});
  if (a.indexer) run_indexer(pass, a, *a.indexer, index_cache);
  if (pass.step.query_scale != nullptr) {
    pass.each_token([&](std::int64_t t) {
      scale_row(work.q + t * q_stride, pass.step.query_scale[t], q_stride, work.q + t * q_stride);
    });
  }
  shrink_queries(pass, a);
  make_mla_queries(pass, a);
  attend_all(pass, a, cache);
  if (work.absorbed.empty()) return;
  shrink_latents(pass, a);
  const std::int64_t strips = (a.value_dim + kStrip - 1) / kStrip;
  pass.each_in_turn(a.heads * strips, [&](std::int64_t item, bool continues) {
    make_head_values(pass, a, item / strips, item % strips, continues);
  });
}

// --- GQA ------------------------------------------------------------------------------------------------------------

inline void attend_gqa(const Pass& pass, const Attention& a, const Cache& cache) {
  const Workspace& work = pass.work;
  const std::int64_t dim = a.rope_dim, kv_width = a.kv_heads * dim;
  multiply_all(pass, {{&a.q, &work.hidden, work.q, a.heads * dim},
                      {&a.k, &work.hidden, work.row, 2 * kv_width},
                      {&a.v, &work.hidden, work.row + kv_width, 2 * kv_width}});
  pass.each_token([&](std::int64_t t) {
    const Rotation turn = rotation_of(pass.step, a, t);
    const auto finish_head = [&](const std::optional<Norm>& norm, bf16* head) {
      if (norm) rms_norm(*norm, head, head);
      rotate(head, dim, turn.cos, turn.sin, a.interleave);
    };
    for (std::int64_t h = 0; h < a.heads; ++h) finish_head(a.q_norm, work.q + (t * a.heads + h) * dim);
    bf16* row = work.row + t * 2 * kv_width;
    for (std::int64_t h = 0; h < a.kv_heads; ++h) finish_head(a.k_norm, row + h * dim);
    store_token(pass, a, cache, t);
    pad_row(work.attended.values + t * work.attended.stride, a.heads * dim);
  });
  attend_all(pass, a, cache);
}

// --- both -----------------------------------------------------------------------------------------------------------

// x += attention (norm x).
inline void add_attention(const Pass& pass, const Layer& layer, std::int64_t number) {
  const Attention& a = layer.attention;
  const Cache& cache = pass.step.caches[number];
  norm_residual(pass, layer.input_norm);
  if (a.is_mla()) {
    attend_mla(pass, a, cache, pass.step.index_caches[number]);
  } else {
    attend_gqa(pass, a, cache);
  }
  if (pass.model.division.tensor > 1) return multiply_divided_into_residual(pass, a.o, a.heads * a.out_dim());
  multiply_into_residual(pass, a.o, pass.work.attended);
}

}  // namespace lowlat::LOWLAT_ISA
