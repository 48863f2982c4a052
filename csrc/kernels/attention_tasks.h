// Attention tasks of a step: groups of query rows over KV cache entries, whole or by splits (flash decoding), dense or
// over the tokens that sparse attention chose.
#pragma once

#include <algorithm>

#include "attention_splits.h"
#include "phases.h"

namespace lowlat::LOWLAT_ISA {

// How the heads of a layer read cache entries.
inline RowView row_view(const Attention& a, std::int64_t kv_head) {
  if (!a.is_mla()) return {kv_head * a.rope_dim, a.rope_dim, (a.kv_heads + kv_head) * a.rope_dim, a.rope_dim};
  // Without NoPE channels the latent takes no part in the scores.
  const std::int64_t key = a.nope_dim == 0 ? a.latent_dim : 0;
  return {key, a.key_dim() - key, 0, a.latent_dim};
}

// The query rows of a group, [tokens, heads of the KV head], contiguous and padded.
inline Queries queries_of(const Pass& pass, const Attention& a, const QueryGroup& group) {
  const Workspace& work = pass.work;
  const Sequence& sequence = pass.step.sequences[group.sequence];
  const std::int64_t heads = a.is_mla() ? a.heads : a.heads / a.kv_heads;
  const std::int64_t token = sequence.first_token + group.token, rows = group.tokens * heads;
  auto* first = pass.scratch.get<std::int64_t>(3, 2 * rows);
  auto* last = first + rows;
  for (std::int64_t r = 0; r < rows; ++r) {
    last[r] = group.choice < 0 ? sequence.start + group.token + r / heads + 1 : a.topk;
    first[r] = a.window == 0 ? 0 : most(0, last[r] - a.window);
  }
  if (a.is_mla()) {
    const std::int64_t key = row_view(a, 0).key;
    return {work.absorbed_q + token * heads * work.absorbed_stride + key, work.absorbed_stride, rows, first, last};
  }
  const std::int64_t stride = round_up(a.rope_dim, 32);
  auto* q = pass.scratch.get<bf16>(4, rows * stride);
  for (std::int64_t t = 0; t < group.tokens; ++t) {
    const bf16* from = work.q + ((token + t) * a.heads + group.kv_head * heads) * a.rope_dim;
    copy_rows(from, a.rope_dim, heads, a.rope_dim, q + t * heads * stride);
  }
  return {q, stride, rows, first, last};
}

inline CachedKeys keys_of(const Pass& pass, const Attention& a, const Cache& cache, const QueryGroup& group) {
  const std::int32_t* chosen = group.choice < 0 ? nullptr : pass.work.choices + group.choice * a.topk;
  return {cache, pass.step.sequences[group.sequence].pages, a.entry_dim(), row_view(a, group.kv_head), a.scale, chosen};
}

// Where the attention output of row r of a group goes.
inline bf16* attended_row(const Pass& pass, const Attention& a, const QueryGroup& group, std::int64_t row) {
  const Workspace& work = pass.work;
  const std::int64_t heads = a.is_mla() ? a.heads : a.heads / a.kv_heads;
  const std::int64_t token = pass.step.sequences[group.sequence].first_token + group.token + row / heads;
  const std::int64_t head = group.kv_head * heads + row % heads;
  if (a.is_mla()) return work.mixed + (token * heads + head) * work.mixed_stride;
  return work.attended.values + token * work.attended.stride + head * a.rope_dim;
}

inline std::int64_t group_rows_of(const Attention& a, const QueryGroup& group) {
  return group.tokens * (a.is_mla() ? a.heads : a.heads / a.kv_heads);
}

inline SoftmaxState partial_state(const Workspace& work, std::int64_t row) {
  return {work.top + row, work.total + row, work.values + row * work.value_stride, work.value_stride};
}

inline SoftmaxState scratch_state(const Pass& pass, std::int64_t rows, int slot) {
  const std::int64_t stride = pass.work.value_stride;
  auto* memory = pass.scratch.get<float>(slot, rows * (stride + 2));
  return {memory + rows * stride, memory + rows * (stride + 1), memory, stride};
}

// Keeps a split's state until fold_splits().
inline void store_split(const Pass& pass, const QueryGroup& group, std::int64_t split, std::int64_t rows,
                        const SoftmaxState& state) {
  // States are accumulated in thread-local memory: threads that write to adjacent rows would share cache lines (false
  // sharing).
  const SoftmaxState out = partial_state(pass.work, group.partial + split * rows);
  std::memcpy(out.top, state.top, rows * sizeof(float));
  std::memcpy(out.total, state.total, rows * sizeof(float));
  std::memcpy(out.values, state.values, rows * state.stride * sizeof(float));
}

// Tokens of sparse attention, which chose their contexts.
inline void run_chosen_task(const Pass& pass, const Attention& a, const Cache& cache, const AttentionTask& task) {
  const QueryGroup& group = pass.work.groups[task.group];
  const std::int64_t rows = round_up(a.heads, kTile), all = group.tokens * rows;
  const SoftmaxState state = scratch_state(pass, all, 8), part = scratch_state(pass, all, 9);
  const auto queries = [&](std::int64_t t) {
    QueryGroup one = group;
    one.token += t;
    one.tokens = 1;
    return queries_of(pass, a, one);
  };
  const bool is_part = task.split >= 0;
  const std::int64_t first = is_part ? task.split : 0, last = is_part ? first + 1 : num_chosen_splits(a.topk);
  attend_chosen(keys_of(pass, a, cache, group), a.topk, group.tokens, a.heads, first, last, queries, pass.scratch, state,
                part);
  if (is_part) return store_split(pass, group, task.split, a.heads, state);
  for (std::int64_t t = 0; t < group.tokens; ++t) {
    for (std::int64_t head = 0; head < a.heads; ++head) {
      finish(state, t * rows + head, a.latent_dim, attended_row(pass, a, group, t * a.heads + head));
    }
  }
}

inline void run_attention_task(const Pass& pass, const Attention& a, const Cache& cache, const AttentionTask& task) {
  const QueryGroup& group = pass.work.groups[task.group];
  if (group.choice >= 0) return run_chosen_task(pass, a, cache, task);
  const Queries q = queries_of(pass, a, group);
  const CachedKeys keys = keys_of(pass, a, cache, group);
  const std::int64_t context = q.last[q.rows - 1];
  const SoftmaxState state = scratch_state(pass, q.rows, 8), part = scratch_state(pass, q.rows, 9);
  if (task.split >= 0) {
    attend_splits(keys, q, task.split, task.split + 1, context, pass.scratch, state, part);
    return store_split(pass, group, task.split, q.rows, state);
  }
  attend_splits(keys, q, 0, num_splits(context), context, pass.scratch, state, part);
  const std::int64_t value_dim = row_view(a, 0).value_dim;
  for (std::int64_t r = 0; r < q.rows; ++r) finish(state, r, value_dim, attended_row(pass, a, group, r));
}

// Merges the splits of every group that has several.
inline void fold_splits(const Pass& pass, const Attention& a) {
  const Workspace& work = pass.work;
  if (work.split_rows == 0) return;
  const std::int64_t value_dim = row_view(a, 0).value_dim;
  pass.each(work.split_rows, [&](std::int64_t item) {
    const auto follows = std::upper_bound(work.groups.begin(), work.groups.end(), item,
                                          [](std::int64_t row, const QueryGroup& group) { return row < group.split_row; });
    const QueryGroup& group = *std::prev(follows);
    const std::int64_t row = item - group.split_row, rows = group_rows_of(a, group);
    const SoftmaxState state = partial_state(work, group.partial + row);
    for (std::int64_t split = 1; split < group.splits; ++split) {
      fold(partial_state(work, group.partial + split * rows + row), state, 1);
    }
    finish(state, 0, value_dim, attended_row(pass, a, group, row));
  });
}

}  // namespace lowlat::LOWLAT_ISA
