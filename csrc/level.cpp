// One instruction-set level (AMX, AVX-512, AVX2, NEON or portable): compiled once per level with its flags and
// LOWLAT_<LEVEL> defined. Everything is in the level's own namespace; the function table at the end is its only
// exported symbol (cmake/levels.cmake).
#include "ops.h"

#include <cstring>
#include <vector>

#include "kernels/flash_attention_training.h"
#include "kernels/common.h"
#include "kernels/indexer_loss.h"
#include "kernels/kl_divergence.h"
#include "kernels/grouped_gemm.h"
#include "kernels/linear.h"
#include "kernels/quantize.h"
#include "kernels/kv_cache.h"
#include "kernels/routing.h"
#include "kernels/rowwise.h"
#include "kernels/sampling.h"
#include "kernels/scale_search.h"
#include "kernels/step.h"
#include "kernels/training.h"
#include "workspace.h"

namespace lowlat::LOWLAT_ISA {

namespace single {

void linear(Team& team, const Matrix& w, const Activations& x, float* out) {
  if (x.rows == 0) return;
  const ProductSession session;
  Buffer panel_buffer, block_buffer;
  auto* panels = buffer_array<Panel>(panel_buffer, strip_panels(w));
  auto* block = buffer_array<float>(block_buffer, x.rows * kStrip);
  const std::int64_t chunk = most(1, num_strips(w) / (8 * team.threads()));
  team.for_chunks(num_strips(w), chunk, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t strip = first; strip < last; ++strip) {
      multiply_strip(w, strip, x, panels, block, next_strip(w, strip, strip + 1 < last));
      const std::int64_t column = strip * kStrip;
      const auto width = static_cast<std::size_t>(least(kStrip, w.rows - column)) * sizeof(float);
      for (std::int64_t r = 0; r < x.rows; ++r) std::memcpy(out + r * w.rows + column, block + r * kStrip, width);
    }
  });
}

void pack(Team& team, const void* weights, bool is_bf16, std::int64_t stride, const Matrix& to) {
  team.for_chunks(to.tiles(), 1, [&](std::int64_t tile, std::int64_t) {
    pack_tile(weights, is_bf16, stride, to, tile);
  });
}

template <class Number>
void dequantize(Team& team, const Matrix& w, Number* out) {
  const std::int64_t chunk = most(1, w.rows / (8 * team.threads()));
  team.for_chunks(w.rows, chunk, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t row = first; row < last; ++row) gguf::dequantize_row(w, row, out + row * w.columns);
  });
}

void interleave(Team& team, const Matrix& rows, std::uint8_t* out) {
  team.for_chunks(rows.tiles(), 1, [&](std::int64_t tile, std::int64_t) { gguf::interleave_tile(rows, tile, out); });
}

void norm(Team& team, const Norm& norm, const bf16* x, std::int64_t rows, bf16* out) {
  team.for_chunks(rows, 1, [&](std::int64_t row, std::int64_t) {
    rms_norm(norm, x + row * norm.size, out + row * norm.size);
  });
}

void rotate_heads(Team& team, bf16* x, std::int64_t tokens, std::int64_t heads, std::int64_t dim, const float* cos,
                  const float* sin, bool interleave) {
  team.for_chunks(tokens, 1, [&](std::int64_t token, std::int64_t) {
    for (std::int64_t head = 0; head < heads; ++head) {
      rotate(x + (token * heads + head) * dim, dim, cos + token * (dim / 2), sin + token * (dim / 2), interleave);
    }
  });
}

void gated(Team& team, const bf16* gate, const bf16* up, std::int64_t rows, std::int64_t size, bf16* out) {
  team.for_chunks(rows, 1, [&](std::int64_t row, std::int64_t) {
    for (std::int64_t i = row * size; i < (row + 1) * size; i += 16) {
      const std::int64_t left = (row + 1) * size - i;
      store_bf16(out + i, swiglu(load_bf16(gate + i, left), load_bf16(up + i, left)), left);
    }
  });
}

void route(Team& team, const Router& router, std::int64_t tokens, float* scores, std::int32_t* experts,
           float* weights) {
  Buffer choose_scratch_size;
  auto* memory = buffer_array<float>(choose_scratch_size, choose_scratch(router));
  team.for_chunks(tokens, 1, [&](std::int64_t token, std::int64_t) {
    float* row = scores + token * router.experts;
    gate_scores(router, row);
    choose(router, row, memory, experts + token * router.chosen, weights + token * router.chosen);
  });
}

void store_entries(Team& team, const bf16* rows, std::int64_t count, std::int64_t entry_dim, const Cache& cache) {
  team.for_chunks(count, 1, [&](std::int64_t row, std::int64_t) {
    store_row(cache, rows + row * entry_dim, entry_dim, cache.data + row * cache.row_bytes);
  });
}

// The query rows of one head group at one position, split by split along the keys.
void attend_position(const PagedAttention& a, std::int64_t query, std::int64_t group, Scratch& scratch) {
  const std::int64_t rows = a.heads / a.kv_heads, row = query * a.heads + group * rows;
  const std::int64_t last = a.start + query + 1, first = a.window > 0 ? most(0, last - a.window) : 0;
  auto* bounds = scratch.get<std::int64_t>(3, 2 * rows);
  for (std::int64_t r = 0; r < rows; ++r) {
    bounds[r] = first;
    bounds[rows + r] = last;
  }
  const Queries q{a.q + row * a.q_stride, a.q_stride, rows, bounds, bounds + rows};
  const CachedKeys keys{a.cache, a.pages, a.entry_dim,
                        {group * a.key_step, a.key_dim, a.value_offset + group * a.value_step, a.value_dim}, a.scale};
  const std::int64_t stride = round_up(a.value_dim, 32);
  const auto state = [&](int slot) {
    auto* memory = scratch.get<float>(slot, rows * (stride + 2));
    return SoftmaxState{memory + rows * stride, memory + rows * (stride + 1), memory, stride};
  };
  const SoftmaxState all = state(8), part = state(9);
  attend_splits(keys, q, 0, num_splits(last), last, scratch, all, part);
  for (std::int64_t r = 0; r < rows; ++r) finish(all, r, a.value_dim, a.out + (row + r) * a.value_dim);
}

void attention(Team& team, const PagedAttention& a) {
  const ProductSession session;
  Scratch scratch;
  team.for_chunks(a.queries * a.kv_heads, 1, [&](std::int64_t task, std::int64_t) {
    attend_position(a, task / a.kv_heads, task % a.kv_heads, scratch);
  });
}

void store_index_keys(Team& team, const bf16* keys, std::int64_t count, std::int64_t dim, const IndexCache& cache) {
  team.for_chunks(count, 1, [&](std::int64_t slot, std::int64_t) {
    store_index_key(cache, keys + slot * dim, dim, slot);
  });
}

void choose_of_queries(Team& team, const TokenChoice& c) {
  const ProductSession session;
  Scratch scratch;
  const IndexQueries queries{c.q, c.weights, c.queries, c.heads, c.dim};
  team.for_chunks(c.start + c.queries, kKeyBlock, [&](std::int64_t first, std::int64_t last) {
    score_index_keys(queries, c.cache, c.pages, first, last, scratch, c.scores, c.score_stride);
  });
  team.for_chunks(c.queries, 1, [&](std::int64_t i, std::int64_t) {
    choose_tokens(c.scores + i * c.score_stride, c.start + i + 1, c.topk, scratch, c.chosen + i * c.topk);
  });
}

}  // namespace single

}  // namespace lowlat::LOWLAT_ISA

#define LOWLAT_JOIN(a, b) a##b
#define LOWLAT_NAME(prefix, isa) LOWLAT_JOIN(prefix, isa)
#define LOWLAT_QUOTE(text) #text
#define LOWLAT_STRING(text) LOWLAT_QUOTE(text)

extern "C" const lowlat::Ops LOWLAT_NAME(lowlat_ops_, LOWLAT_ISA);
const lowlat::Ops LOWLAT_NAME(lowlat_ops_, LOWLAT_ISA) = {
    .name = LOWLAT_STRING(LOWLAT_ISA),
    .linear = lowlat::LOWLAT_ISA::single::linear,
    .pack = lowlat::LOWLAT_ISA::single::pack,
    .dequantize = lowlat::LOWLAT_ISA::single::dequantize<float>,
    .dequantize_to_bf16 = lowlat::LOWLAT_ISA::single::dequantize<lowlat::bf16>,
    .search_int4 = lowlat::LOWLAT_ISA::quantization::search<true>,
    .search_int8 = lowlat::LOWLAT_ISA::quantization::search<false>,
    .feedback_int4 = lowlat::LOWLAT_ISA::quantization::feedback,
    .interleave = lowlat::LOWLAT_ISA::single::interleave,
    .rms_norm = lowlat::LOWLAT_ISA::single::norm,
    .rotate = lowlat::LOWLAT_ISA::single::rotate_heads,
    .swiglu = lowlat::LOWLAT_ISA::single::gated,
    .route = lowlat::LOWLAT_ISA::single::route,
    .store_entries = lowlat::LOWLAT_ISA::single::store_entries,
    .attention = lowlat::LOWLAT_ISA::single::attention,
    .store_index_keys = lowlat::LOWLAT_ISA::single::store_index_keys,
    .choose_tokens = lowlat::LOWLAT_ISA::single::choose_of_queries,
    .draw = lowlat::LOWLAT_ISA::sampling::draw,
    .norm_forward = lowlat::LOWLAT_ISA::training::norm_forward,
    .norm_backward = lowlat::LOWLAT_ISA::training::norm_backward,
    .gated_forward = lowlat::LOWLAT_ISA::training::gated_forward,
    .gated_backward = lowlat::LOWLAT_ISA::training::gated_backward,
    .entropy = lowlat::LOWLAT_ISA::training::entropy,
    .divergence = lowlat::LOWLAT_ISA::training::divergence,
    .rotation = lowlat::LOWLAT_ISA::training::rotation,
    .combine = lowlat::LOWLAT_ISA::training::combine,
    .grouped = lowlat::LOWLAT_ISA::grouped::products,
    .outer = lowlat::LOWLAT_ISA::grouped::outer,
    .causal_forward = lowlat::LOWLAT_ISA::causal::forward,
    .causal_backward = lowlat::LOWLAT_ISA::causal::backward,
    .indexer_loss = lowlat::LOWLAT_ISA::indexer::loss,
    .step = lowlat::LOWLAT_ISA::run_step,
};
