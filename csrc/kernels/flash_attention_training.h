// Flash attention for training: causal, whole sequences, 64 queries at a time, forward by 256 keys and backward by 64
// (FlashAttention-2, arXiv 2307.08691). The rows of a head are packed as GEMM panels.
//
// A KV head of a sequence is one work item of one thread, and its sums have a fixed order: bits do not depend on the
// number of threads.
#pragma once

#include <cmath>

#include "../training.h"
#include "../workspace.h"
#include "flash_attention.h"
#include "kv_cache.h"

namespace lowlat::LOWLAT_ISA::causal {

constexpr std::int64_t kBlock = kKeyBlock;
constexpr int kForwardBlocks = 4;  // key blocks per step of the forward softmax
constexpr std::int64_t kForwardKeys = kForwardBlocks * kBlock;
constexpr float kNever = 1e30f;  // logsumexp of a padding query: every weight is 0

inline std::int64_t blocks_of(std::int64_t length) { return (length + kBlock - 1) / kBlock; }

// A head's rows as panels, block by block: row-major (products with rows), and transposed (sums over rows).
struct HeadPanels {
  Panel* rows = nullptr;    // [blocks, 4 tiles, panels of width]
  Panel* transposed = nullptr;  // [blocks, tiles of width rounded up to 2, 2]
  std::int64_t width = 0, length = 0;

  std::int64_t row_panels() const { return 4 * num_panels(width); }
  std::int64_t transposed_panels() const { return 4 * num_panels(width); }
  Panel* block_rows(std::int64_t block) const { return rows + block * row_panels(); }
  Panel* block_transposed(std::int64_t block) const { return transposed + block * transposed_panels(); }
  std::int64_t block_length(std::int64_t block) const { return least(kBlock, length - block * kBlock); }
};

// Packs a block of a head's rows, `step` elements apart, in the forms that have memory.
inline void pack_block(const HeadPanels& head, std::int64_t block, const bf16* from, std::int64_t step) {
  const std::int64_t there = head.block_length(block), count = num_panels(head.width);
  const Matrix m = view(from + block * kBlock * step, there, head.width, step);
  for (std::int64_t tile = 0; head.rows != nullptr && tile < kBlock / kTile; ++tile) {
    Panel* panels = head.block_rows(block) + tile * count;
    if (tile < m.tiles()) {
      load_panels(m, tile, panels);
    } else {
      std::memset(static_cast<void*>(panels), 0, count * sizeof(Panel));
    }
  }
  const std::int64_t pairs_of_rows = num_panels(there);
  for (std::int64_t i = 0; head.transposed != nullptr && i < count; ++i) {
    load_transposed_panels(m, kColumns * i, 0, there, head.block_transposed(block) + 2 * i * pairs_of_rows, pairs_of_rows);
  }
}

// With one buffer alone, packs that form alone.
inline HeadPanels make_panels(const bf16* from, std::int64_t step, std::int64_t length, std::int64_t width, Buffer* rows,
                              Buffer* transposed) {
  HeadPanels head;
  head.width = width;
  head.length = length;
  if (rows != nullptr) head.rows = buffer_array<Panel>(*rows, blocks_of(length) * head.row_panels());
  if (transposed != nullptr) head.transposed = buffer_array<Panel>(*transposed, blocks_of(length) * head.transposed_panels());
  for (std::int64_t block = 0; block < blocks_of(length); ++block) pack_block(head, block, from, step);
  return head;
}

// out [rows, 64] = x [rows, width] . block^T
inline void times_rows(const HeadPanels& head, std::int64_t block, const bf16* x, std::int64_t rows, float* out) {
  const std::int64_t count = num_panels(head.width);
  multiply(head.block_rows(block), kBlock / kTile, count, count, x, round_up(head.width, kColumns), rows, out, kBlock,
           false);
}

// out [rows, width] += x [rows, 64] . block
inline void times_block(const HeadPanels& head, std::int64_t block, const bf16* x, std::int64_t rows, float* out,
                        std::int64_t out_stride) {
  const std::int64_t count = num_panels(head.block_length(block));
  multiply(head.block_transposed(block), 2 * num_panels(head.width), count, count, x, kBlock, rows, out, out_stride, true);
}

// One head of one sequence.
struct HeadAt {
  std::int64_t start, length, head, kv_head;
};

// Scratch of a thread.
struct Memory {
  Buffer key_rows, key_transposed, value_transposed, query_rows, query_transposed, grad_rows, grad_transposed;
  Buffer q, k, v, scores, products, weights, slopes, transposed, tops, totals, values, first, last, logs, along;
  Buffer grad_q, grad_k, grad_v;
};

// --- forward -------------------------------------------------------------------------------------------------------------

// A head's keys and values as panels, one span after another.
struct HeadSpans {
  Panel* keys;
  Panel* values;
  std::int64_t key_dim, value_dim;

  SpanPanels span(std::int64_t number) const {
    return {keys + number * SpanPanels::key_panels(key_dim, kForwardBlocks),
            values + number * SpanPanels::value_panels(value_dim, kForwardBlocks), num_panels(key_dim),
            2 * kForwardBlocks};
  }
};

inline HeadSpans make_spans(const CausalPass& p, const HeadAt& at, Memory& memory) {
  const std::int64_t spans = (at.length + kForwardKeys - 1) / kForwardKeys;
  const std::int64_t k_step = p.kv_heads * p.key_dim, v_step = p.kv_heads * p.value_dim;
  const HeadSpans head{buffer_array<Panel>(memory.key_rows, spans * SpanPanels::key_panels(p.key_dim, kForwardBlocks)),
                       buffer_array<Panel>(memory.value_transposed, spans * SpanPanels::value_panels(p.value_dim, kForwardBlocks)),
                       p.key_dim, p.value_dim};
  for (std::int64_t key = 0; key < at.length; key += kBlock) {
    const std::int64_t count = least(kBlock, at.length - key), token = at.start + key;
    const KeyBlock block{view(p.k + token * k_step + at.kv_head * p.key_dim, count, p.key_dim, k_step),
                         view(p.v + token * v_step + at.kv_head * p.value_dim, count, p.value_dim, v_step),
                         {},
                         {}};
    head.span(key / kForwardKeys).load(key % kForwardKeys / kBlock, block);
  }
  return head;
}

inline void forward_head(const CausalPass& p, const HeadAt& at, const HeadSpans& spans, Memory& memory) {
  const std::int64_t step = p.heads * p.key_dim, stride = round_up(p.key_dim, kColumns);
  const std::int64_t out_stride = round_up(p.value_dim, kColumns);
  auto* q = buffer_array<bf16>(memory.q, kBlock * stride);
  auto* first = buffer_array<std::int64_t>(memory.first, kBlock);
  auto* last = buffer_array<std::int64_t>(memory.last, kBlock);
  const ScoreScratch scratch{buffer_array<float>(memory.scores, kBlock * kForwardKeys),
                             buffer_array<bf16>(memory.weights, kBlock * kForwardKeys), nullptr, kForwardKeys};
  const SoftmaxState state{buffer_array<float>(memory.tops, kBlock), buffer_array<float>(memory.totals, kBlock),
                           buffer_array<float>(memory.values, kBlock * out_stride), out_stride};
  for (std::int64_t start = 0; start < at.length; start += kBlock) {
    const std::int64_t rows = least(kBlock, at.length - start), token = at.start + start, seen = start + rows;
    copy_rows(p.q + token * step + at.head * p.key_dim, step, rows, p.key_dim, q);
    for (std::int64_t r = 0; r < rows; ++r) {
      first[r] = 0;
      last[r] = start + r + 1;
    }
    state.clear(rows);
    const Queries queries{q, stride, rows, first, last};
    for (std::int64_t key = 0; key < seen; key += kForwardKeys) {
      attend_loaded<kForwardBlocks>(queries, spans.span(key / kForwardKeys), least(kForwardKeys, seen - key), p.value_dim,
                                    key, p.scale, scratch, state);
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      finish(state, r, p.value_dim, p.out + ((token + r) * p.heads + at.head) * p.value_dim);
      p.log_total[(token + r) * p.heads + at.head] = state.top[r] + std::log(state.total[r]);
    }
  }
}

// --- backward ------------------------------------------------------------------------------------------------------------

// Recomputes weights [keys, 64] = exp(score - logsumexp) and score gradients `slopes` = weights * (product - along) *
// scale, both key-major. In the diagonal block a query attends to keys up to its own.
inline void transposed_weights(std::int64_t keys, bool is_diagonal, float scale, const float* scores, const float* products,
                           const float* logs, const float* along, bf16* weights, bf16* slopes) {
  const F by = set1(scale), end = set1(static_cast<float>(kBlock));
  for (std::int64_t key = 0; key < keys; ++key) {
    for (std::int64_t i = 0; i < kBlock; i += 32) {
      F weight[2], slope[2];
      for (int half = 0; half < 2; ++half) {
        const std::int64_t query = i + 16 * half, at = key * kBlock + query;
        weight[half] = exp_of_negative(min(zero(), sub(mul(load(scores + at), by), load(logs + query))));
        if (is_diagonal) {
          const F number = add(lane_numbers(), set1(static_cast<float>(query)));
          weight[half] = within(weight[half], number, set1(static_cast<float>(key)), end, zero());
        }
        slope[half] = mul(mul(weight[half], sub(load(products + at), load(along + query))), by);
      }
      store_pairs(weights + key * kBlock + i, pairs_in_order(weight[0], weight[1]));
      store_pairs(slopes + key * kBlock + i, pairs_in_order(slope[0], slope[1]));
    }
  }
}

// delta = rowsum(grad * out) of every query, the softmax Jacobian's correction term.
inline void sums_along(const CausalPass& p, const HeadAt& at, float* logs, float* along) {
  const std::int64_t rows = round_up(at.length, kBlock);
  for (std::int64_t r = 0; r < rows; ++r) {
    logs[r] = kNever;
    along[r] = 0;
    if (r >= at.length) continue;
    const std::int64_t place = (at.start + r) * p.heads + at.head;
    logs[r] = p.log_total[place];
    const bf16* grad = p.grad + place * p.value_dim;
    const bf16* out = p.out + place * p.value_dim;
    const std::int64_t whole = p.value_dim / 16 * 16, left = p.value_dim - whole;
    F total = zero();
    for (std::int64_t c = 0; c < whole; c += 16) total = fma(load_bf16(grad + c), load_bf16(out + c), total);
    if (left > 0) total = fma(load_bf16(grad + whole, left), load_bf16(out + whole, left), total);
    along[r] = sum(total);
  }
}

// Gradients of one KV head's keys and values, and of one head's queries, accumulated in fp32.
struct Sums {
  float* k;  // [length, k_stride]
  float* v;  // [length, v_stride]
  float* q;  // [length rounded up to 64, k_stride]
  std::int64_t k_stride, v_stride;
};

// Adds the contributions of one query head.
inline void backward_head(const CausalPass& p, const HeadAt& at, const bf16* k, const bf16* v, const HeadPanels& keys_transposed,
                          const Sums& sums, Memory& memory) {
  const std::int64_t q_step = p.heads * p.key_dim, v_step = p.heads * p.value_dim, blocks = blocks_of(at.length);
  const HeadPanels queries = make_panels(p.q + at.start * q_step + at.head * p.key_dim, q_step, at.length, p.key_dim,
                                         &memory.query_rows, &memory.query_transposed);
  const HeadPanels grads = make_panels(p.grad + at.start * v_step + at.head * p.value_dim, v_step, at.length, p.value_dim,
                                       &memory.grad_rows, &memory.grad_transposed);
  auto* logs = buffer_array<float>(memory.logs, blocks * kBlock);
  auto* along = buffer_array<float>(memory.along, blocks * kBlock);
  sums_along(p, at, logs, along);
  auto* scores = buffer_array<float>(memory.scores, kBlock * kBlock);
  auto* products = buffer_array<float>(memory.products, kBlock * kBlock);
  auto* weights = buffer_array<bf16>(memory.weights, kBlock * kBlock);
  auto* slopes = buffer_array<bf16>(memory.slopes, kBlock * kBlock);
  auto* transposed = buffer_array<bf16>(memory.transposed, kBlock * kBlock);
  Panel transposed_panels[2 * kBlock / kColumns];
  const std::int64_t k_width = round_up(p.key_dim, kColumns), v_width = round_up(p.value_dim, kColumns);
  for (std::int64_t key = 0; key < blocks; ++key) {
    const std::int64_t first = key * kBlock, keys = least(kBlock, at.length - first);
    for (std::int64_t query = key; query < blocks; ++query) {
      times_rows(queries, query, k + first * k_width, keys, scores);
      times_rows(grads, query, v + first * v_width, keys, products);
      transposed_weights(keys, key == query, p.scale, scores, products, logs + query * kBlock, along + query * kBlock, weights,
                     slopes);
      times_block(grads, query, weights, keys, sums.v + first * sums.v_stride, sums.v_stride);
      times_block(queries, query, slopes, keys, sums.k + first * sums.k_stride, sums.k_stride);
      transpose_columns(view(slopes, keys, kBlock, kBlock), transposed_panels, transposed, kBlock);
      times_block(keys_transposed, key, transposed, kBlock, sums.q + query * kBlock * sums.k_stride, sums.k_stride);
    }
  }
}

inline void write_rows(const float* from, std::int64_t stride, std::int64_t rows, std::int64_t width, bf16* to,
                       std::int64_t step) {
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < width; c += 16) {
      store_bf16(to + r * step + c, load(from + r * stride + c, width - c), width - c);
    }
  }
}

// All query heads of one KV head of one sequence.
inline void backward_group(const CausalPass& p, HeadAt at, Memory& memory) {
  const std::int64_t k_step = p.kv_heads * p.key_dim, v_step = p.kv_heads * p.value_dim, group = p.heads / p.kv_heads;
  const bf16* k_from = p.k + at.start * k_step + at.kv_head * p.key_dim;
  const bf16* v_from = p.v + at.start * v_step + at.kv_head * p.value_dim;
  auto* k = buffer_array<bf16>(memory.k, at.length * round_up(p.key_dim, kColumns));
  auto* v = buffer_array<bf16>(memory.v, at.length * round_up(p.value_dim, kColumns));
  const HeadPanels k_transposed = make_panels(k_from, k_step, at.length, p.key_dim, nullptr, &memory.key_transposed);
  copy_rows(k_from, k_step, at.length, p.key_dim, k);
  copy_rows(v_from, v_step, at.length, p.value_dim, v);
  Sums sums;
  sums.k_stride = round_up(p.key_dim, kColumns);
  sums.v_stride = round_up(p.value_dim, kColumns);
  const std::int64_t q_size = round_up(at.length, kBlock) * sums.k_stride;
  sums.k = buffer_array<float>(memory.grad_k, at.length * sums.k_stride);
  sums.v = buffer_array<float>(memory.grad_v, at.length * sums.v_stride);
  sums.q = buffer_array<float>(memory.grad_q, q_size);
  std::memset(sums.k, 0, at.length * sums.k_stride * sizeof(float));
  std::memset(sums.v, 0, at.length * sums.v_stride * sizeof(float));
  for (at.head = at.kv_head * group; at.head < (at.kv_head + 1) * group; ++at.head) {
    std::memset(sums.q, 0, q_size * sizeof(float));
    backward_head(p, at, k, v, k_transposed, sums, memory);
    const std::int64_t step = p.heads * p.key_dim;
    write_rows(sums.q, sums.k_stride, at.length, p.key_dim, p.grad_q + at.start * step + at.head * p.key_dim, step);
  }
  write_rows(sums.k, sums.k_stride, at.length, p.key_dim, p.grad_k + at.start * k_step + at.kv_head * p.key_dim, k_step);
  write_rows(sums.v, sums.v_stride, at.length, p.value_dim, p.grad_v + at.start * v_step + at.kv_head * p.value_dim, v_step);
}

inline void forward_group(const CausalPass& p, HeadAt at, Memory& memory) {
  const std::int64_t group = p.heads / p.kv_heads;
  const HeadSpans spans = make_spans(p, at, memory);
  for (at.head = at.kv_head * group; at.head < (at.kv_head + 1) * group; ++at.head) {
    forward_head(p, at, spans, memory);
  }
}

template <class Body>
void for_groups(Team& team, const CausalPass& p, Body&& body) {
  const ProductSession session;
  Memory memory;
  team.for_chunks(p.sequences * p.kv_heads, 1, [&](std::int64_t task, std::int64_t) {
    const std::int64_t sequence = task / p.kv_heads, start = sequence == 0 ? 0 : p.ends[sequence - 1];
    body(HeadAt{start, p.ends[sequence] - start, 0, task % p.kv_heads}, memory);
  });
}

inline void forward(Team& team, const CausalPass& p) {
  for_groups(team, p, [&](const HeadAt& at, Memory& memory) { forward_group(p, at, memory); });
}

inline void backward(Team& team, const CausalPass& p) {
  for_groups(team, p, [&](const HeadAt& at, Memory& memory) { backward_group(p, at, memory); });
}

}  // namespace lowlat::LOWLAT_ISA::causal
