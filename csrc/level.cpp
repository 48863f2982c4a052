// One level of instructions: compiled once per level with its flags and its LOWLAT_<LEVEL> defined. Everything here
// lives in the level's own namespace; the table at the end is the only symbol others see (cmake/levels.cmake).
#include "ops.h"

#include <cstring>
#include <vector>

#include "kernels/causal.h"
#include "kernels/common.h"
#include "kernels/divergence.h"
#include "kernels/linear.h"
#include "kernels/pack.h"
#include "kernels/paged.h"
#include "kernels/routing.h"
#include "kernels/rowwise.h"
#include "kernels/step.h"
#include "kernels/training.h"
#include "workspace.h"

namespace lowlat::LOWLAT_ISA {

namespace single {

template <class T>
T* room(Buffer& buffer, std::int64_t count) {
  return static_cast<T*>(buffer.reserve(static_cast<std::size_t>(count) * sizeof(T)));
}

void linear(Team& team, const Matrix& w, const Activations& x, float* out) {
  if (x.rows == 0) return;
  const ProductSession session;
  Buffer panel_room, block_room;
  auto* panels = room<Panel>(panel_room, strip_panels(w));
  auto* block = room<float>(block_room, x.rows * kStrip);
  const std::int64_t chunk = most(1, num_strips(w) / (8 * team.threads()));
  team.for_chunks(num_strips(w), chunk, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t strip = first; strip < last; ++strip) {
      multiply_strip(w, strip, x, panels, block);
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
  Buffer choose_room;
  auto* memory = room<float>(choose_room, choose_scratch(router));
  team.for_chunks(tokens, 1, [&](std::int64_t token, std::int64_t) {
    float* row = scores + token * router.experts;
    gate_scores(router, row);
    choose(router, row, memory, experts + token * router.chosen, weights + token * router.chosen);
  });
}

// Memory of a thread that attends with `rows` query rows.
struct AttentionRoom {
  Buffer panels, scores, weights, cached, first, last, tops[2], totals[2], values[2];

  SoftmaxState state(int i, std::int64_t rows, std::int64_t stride) {
    return {room<float>(tops[i], rows), room<float>(totals[i], rows), room<float>(values[i], rows * stride), stride};
  }
};

// The query rows of one group of heads at one position, split by split as the keys lie.
void attend_position(const PagedAttention& a, std::int64_t query, std::int64_t group, AttentionRoom& memory) {
  constexpr std::int64_t kSplit = 1024;
  const std::int64_t rows = a.heads / a.kv_heads, row = query * a.heads + group * rows;
  const std::int64_t last = a.start + query + 1, first = a.window > 0 ? most(0, last - a.window) : 0;
  auto* firsts = room<std::int64_t>(memory.first, rows);
  auto* lasts = room<std::int64_t>(memory.last, rows);
  for (std::int64_t r = 0; r < rows; ++r) {
    firsts[r] = first;
    lasts[r] = last;
  }
  const Queries q{a.q + row * a.q_stride, a.q_stride, rows, firsts, lasts};
  const ScoreScratch scores{room<float>(memory.scores, rows * kKeyBlock), room<bf16>(memory.weights, rows * kKeyBlock)};
  auto* panels = room<Panel>(memory.panels, attend_panels(a.key_dim));
  auto* cached = room<bf16>(memory.cached, kKeyBlock * round_up(a.row_dim, 32));
  const std::int64_t stride = round_up(a.value_dim, 32);
  const SoftmaxState all = memory.state(0, rows, stride), part = memory.state(1, rows, stride);
  all.clear(rows);
  for (std::int64_t split = first / kSplit * kSplit; split < last; split += kSplit) {
    part.clear(rows);
    const std::int64_t end = least(split + kSplit, last);
    for (std::int64_t key = most(split, first / kKeyBlock * kKeyBlock); key < end; key += kKeyBlock) {
      const std::int64_t keys = least(kKeyBlock, end - key);
      const Rows block = cached_rows(a.cache, a.pages, key, keys, a.row_dim, false, cached);
      const KeyBlock views{view(block.data + group * a.key_step, keys, a.key_dim, block.stride),
                           view(block.data + a.value_offset + group * a.value_step, keys, a.value_dim, block.stride), {}, {}};
      attend(q, views, key, a.scale, panels, scores, part);
    }
    fold(part, all, rows);
  }
  for (std::int64_t r = 0; r < rows; ++r) finish(all, r, a.value_dim, a.out + (row + r) * a.value_dim);
}

void attention(Team& team, const PagedAttention& a) {
  const ProductSession session;
  AttentionRoom memory;
  team.for_chunks(a.queries * a.kv_heads, 1, [&](std::int64_t task, std::int64_t) {
    attend_position(a, task / a.kv_heads, task % a.kv_heads, memory);
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
    .rms_norm = lowlat::LOWLAT_ISA::single::norm,
    .rotate = lowlat::LOWLAT_ISA::single::rotate_heads,
    .swiglu = lowlat::LOWLAT_ISA::single::gated,
    .route = lowlat::LOWLAT_ISA::single::route,
    .attention = lowlat::LOWLAT_ISA::single::attention,
    .norm_forward = lowlat::LOWLAT_ISA::training::norm_forward,
    .norm_backward = lowlat::LOWLAT_ISA::training::norm_backward,
    .gated_forward = lowlat::LOWLAT_ISA::training::gated_forward,
    .gated_backward = lowlat::LOWLAT_ISA::training::gated_backward,
    .entropy = lowlat::LOWLAT_ISA::training::entropy,
    .divergence = lowlat::LOWLAT_ISA::training::divergence,
    .rotation = lowlat::LOWLAT_ISA::training::rotation,
    .combine = lowlat::LOWLAT_ISA::training::combine,
    .causal_forward = lowlat::LOWLAT_ISA::causal::forward,
    .causal_backward = lowlat::LOWLAT_ISA::causal::backward,
    .step = lowlat::LOWLAT_ISA::run_step,
};
