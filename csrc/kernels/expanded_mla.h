// Expanded MLA prefill: keys and values of one head are built from 64 cached latents at a time and used, a few such
// blocks at once, by all new queries of a sequence. Memory grows with the new queries, not with the context.
#pragma once

#include "phases.h"

namespace lowlat::LOWLAT_ISA {

constexpr std::int64_t kQueryGroup = 48;  // queries whose scores with a span are computed at once
constexpr int kBuiltBlocks = 4;          // blocks of a span

// Rows of a matrix in GGUF blocks as a bf16 matrix in scratch.
inline Matrix dense_copy(const Pass& pass, const Matrix& w) {
  Matrix dense;
  dense.rows = w.rows;
  dense.columns = w.columns;
  dense.stride = round_up(w.columns, kColumns);
  auto* rows = pass.scratch.get<bf16>(12, w.rows * dense.stride);
  if (w.is_interleaved) {
    const std::int64_t count = num_panels(w.columns);
    auto* panels = pass.scratch.get<Panel>(14, count);
    for (std::int64_t tile = 0; tile < w.tiles(); ++tile) {
      load_panels(w, tile, panels);
      store_panels(panels, count, least(kTile, w.rows - tile * kTile), rows + tile * kTile * dense.stride, dense.stride);
    }
  } else {
    for (std::int64_t r = 0; r < w.rows; ++r) gguf::dequantize_row(w, r, rows + r * dense.stride);
  }
  dense.data = rows;
  return dense;
}

// Rows of W_UK of a head: [nope_dim, latent_dim], or [latent_dim, nope_dim] with k_b.
inline Matrix key_projection(const Attention& a, std::int64_t head) {
  if (a.k_b) return a.k_b->part(head * a.latent_dim, a.latent_dim);
  return a.kv_b.part(head * (a.nope_dim + a.value_dim), a.nope_dim);
}

// Rows of W_UV of a head: [value_dim, latent_dim].
inline Matrix value_projection(const Attention& a, std::int64_t head) {
  if (a.k_b) return a.kv_b.part(head * a.value_dim, a.value_dim);
  return a.kv_b.part(head * (a.nope_dim + a.value_dim) + a.nope_dim, a.value_dim);
}

// The two halves of a head's kv_b_proj as panels, and scratch for a block of keys and values.
struct HeadProjections {
  Matrix keys, values;           // W_UK [nope_dim, latent_dim], W_UV [value_dim, latent_dim]
  Panel *key_panels, *value_panels;
};

// Panels of W_UK whose rows are latent channels: two tiles of NoPE channels at a time.
inline void load_transposed_keys(const Matrix& w, Panel* panels) {
  const std::int64_t width = num_panels(w.rows);
  for (std::int64_t channel = 0; channel < w.columns; channel += 2 * kTile) {
    load_transposed_panels(w, channel, 0, w.rows, panels + channel / kTile * width, width);
  }
}

inline HeadProjections load_head(const Pass& pass, const Attention& a, std::int64_t head) {
  const std::int64_t width = num_panels(a.latent_dim), key_tiles = round_up(a.nope_dim, 2 * kTile) / kTile;
  HeadProjections p{key_projection(a, head), value_projection(a, head), nullptr, nullptr};
  p.key_panels = pass.scratch.get<Panel>(2, (key_tiles + p.values.tiles()) * width);
  p.value_panels = p.key_panels + key_tiles * width;
  if (a.k_b) {
    const Matrix dense = p.keys.storage == Storage::gguf ? dense_copy(pass, p.keys) : p.keys;
    load_transposed_keys(dense, p.key_panels);
    p.keys = Matrix{};
    p.keys.rows = a.nope_dim;
    p.keys.columns = a.latent_dim;
  } else {
    for (std::int64_t tile = 0; tile < p.keys.tiles(); ++tile) load_panels(p.keys, tile, p.key_panels + tile * width);
  }
  for (std::int64_t tile = 0; tile < p.values.tiles(); ++tile) load_panels(p.values, tile, p.value_panels + tile * width);
  return p;
}

// The update of kv_b_proj for a block of latents: their products with A, [count, rank].
struct BlockUpdate {
  const LowRank* update = nullptr;  // null: none
  const float* shrunk = nullptr;

  // Adds it to a strip of products [count, 32] with rows of kv_b_proj from `first`.
  void add_to(float* out, std::int64_t count, std::int64_t first) const {
    if (update == nullptr) return;
    for (std::int64_t r = 0; r < count; ++r) {
      expand(shrunk + r * update->rank, update->b + first, update->b_stride, update->rank, out + r * kStrip);
    }
  }
};

inline BlockUpdate shrink_block(const Pass& pass, const Attention& a, const LowRank* update, const Rows& rows,
                                std::int64_t count) {
  if (update == nullptr) return {};
  auto* shrunk = pass.scratch.get<float>(13, kKeyBlock * update->rank);
  for (std::int64_t r = 0; r < count; ++r) {
    shrink(rows.data + r * rows.stride, a.latent_dim, update->a, update->a_stride, update->rank,
           shrunk + r * update->rank);
  }
  return {update, shrunk};
}

// out [count, stride] = latents times one projection, which begins at row `first` of kv_b_proj, in bf16.
inline void build(const Matrix& w, const Panel* panels, const Rows& rows, std::int64_t count, const BlockUpdate& update,
                  std::int64_t first, float* strip_out, bf16* out, std::int64_t stride) {
  const std::int64_t width = num_panels(w.columns);
  for (std::int64_t tile = 0; tile < w.tiles(); tile += 2) {
    multiply(panels + tile * width, least(2, w.tiles() - tile), width, width, rows.data, rows.stride, count, strip_out,
             kStrip, false);
    for (std::int64_t own = tile; own < least(tile + 2, w.tiles()); ++own) {
      scale_rows(w, own, count, strip_out + (own - tile) * kTile, kStrip);
    }
    update.add_to(strip_out, count, first + tile * kTile);
    each_half(tile / 2, w.rows, [&](std::int64_t column, int lane, std::int64_t channels) {
      store_lanes(strip_out + lane, nullptr, channels, count, out + column, stride);
    });
  }
}

// The keys and values of a block for head `number`: K [count, query_dim], V [count, value_dim].
inline KeyBlock build_block(const Pass& pass, const Attention& a, const HeadProjections& head, const LowRank* update,
                            std::int64_t number, const Rows& rows, std::int64_t count) {
  const std::int64_t key_stride = round_up(a.query_dim(), 32), value_stride = round_up(a.value_dim, 32);
  auto* k = pass.scratch.get<bf16>(4, kKeyBlock * (key_stride + value_stride));
  auto* v = k + kKeyBlock * key_stride;
  float* out = pass.strip_out(kKeyBlock);
  const BlockUpdate own = shrink_block(pass, a, update, rows, count);
  const std::int64_t first = number * (a.nope_dim + a.value_dim);
  build(head.keys, head.key_panels, rows, count, own, first, out, k, key_stride);
  for (std::int64_t r = 0; r < count; ++r) {
    std::memcpy(k + r * key_stride + a.nope_dim, rows.data + r * rows.stride + a.latent_dim, a.rope_dim * sizeof(bf16));
  }
  build(head.values, head.value_panels, rows, count, own, first + a.nope_dim, out, v, value_stride);
  return {view(k, count, a.query_dim(), key_stride), view(v, count, a.value_dim, value_stride), {}, {}};
}

// Attention of the first new queries of a sequence for one head.
inline void expand_head(const Pass& pass, const Attention& a, const Cache& cache, const ExpandedQueries& expanded,
                        std::int64_t head) {
  const Workspace& work = pass.work;
  const Sequence& sequence = pass.step.sequences[expanded.sequence];
  const std::int64_t queries = expanded.queries, context = sequence.start + queries;
  const std::int64_t value_stride = round_up(a.value_dim, 32);
  const Activations q = rows_of_head(pass, a, head, sequence.first_token, queries, a.query_dim(), 11);
  auto* first = pass.scratch.get<std::int64_t>(3, 2 * queries);
  auto* last = first + queries;
  for (std::int64_t i = 0; i < queries; ++i) {
    first[i] = 0;
    last[i] = sequence.start + i + 1;
  }
  const std::int64_t span = kBuiltBlocks * kKeyBlock;
  const ScoreScratch scores{pass.scratch.get<float>(5, kQueryGroup * span),
                            pass.scratch.get<bf16>(6, kQueryGroup * span), nullptr, span};
  auto* memory = pass.scratch.get<float>(8, queries * (value_stride + 2));
  const SoftmaxState state{memory + queries * value_stride, memory + queries * (value_stride + 1), memory,
                           value_stride};
  state.clear(queries);
  const HeadProjections projections = load_head(pass, a, head);
  const LowRank* update =
      updates_any(pass, a.kv_b_updates) ? update_of(pass, a.kv_b_updates, sequence.first_token) : nullptr;
  const SpanPanels panels{pass.scratch.get<Panel>(9, SpanPanels::key_panels(a.query_dim(), kBuiltBlocks)),
                          pass.scratch.get<Panel>(10, SpanPanels::value_panels(a.value_dim, kBuiltBlocks)),
                          num_panels(a.query_dim()), num_panels(span)};
  auto* gathered = pass.scratch.get<bf16>(7, kKeyBlock * round_up(a.entry_dim(), 32));
  for (std::int64_t at = 0; at < context; at += span) {
    const std::int64_t keys = least(span, context - at);
    for (std::int64_t key = 0; key < keys; key += kKeyBlock) {
      const std::int64_t count = least(kKeyBlock, keys - key);
      const Rows rows = cached_rows(cache, sequence.pages, at + key, count, a.entry_dim(), a.latent_dim % 32 != 0,
                                    {{0, a.entry_dim()}}, gathered);
      panels.load(key / kKeyBlock, build_block(pass, a, projections, update, head, rows, count));
    }
    for (std::int64_t i = 0; i < queries; i += kQueryGroup) {
      const std::int64_t size = least(kQueryGroup, queries - i);
      const std::int64_t seen = least(keys, round_up(last[i + size - 1] - at, kKeyBlock));
      if (seen <= 0) continue;
      attend_loaded<kBuiltBlocks>({q.from(i).values, q.stride, size, first + i, last + i}, panels, seen, a.value_dim,
                                  at, a.scale, scores, state.from(i));
    }
  }
  for (std::int64_t i = 0; i < queries; ++i) {
    finish(state, i, a.value_dim,
           work.attended.values + (sequence.first_token + i) * work.attended.stride + head * a.value_dim);
  }
}

}  // namespace lowlat::LOWLAT_ISA
