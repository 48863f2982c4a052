// Sparse attention (DSA): phases of a layer that has an indexer. Projections, index keys into the KV cache, index scores
// and the choice of tokens for the queries that see more than topk of them.
#pragma once

#include "choose_tokens.h"
#include "index_scores.h"
#include "phases.h"

namespace lowlat::LOWLAT_ISA {

// A token's cos and sin in a layer.
struct Rotation {
  const float *cos, *sin;
};

inline Rotation rotation_of(const Step& step, const Attention& a, std::int64_t token) {
  const std::int64_t at = token * step.pairs + a.first_pair;
  return {step.cos + at, step.sin + at};
}

// The same at the frequencies of an indexer. Uses slot 4 of the scratch.
inline Rotation rotation_of(const Pass& pass, const Attention& a, const Indexer& indexer, std::int64_t token) {
  const Rotation all = rotation_of(pass.step, a, token);
  if (indexer.pair_step == 1) return all;
  const std::int64_t pairs = indexer.rope_dim / 2;
  auto* cos = pass.scratch.get<float>(4, 2 * pairs);
  auto* sin = cos + pairs;
  for (std::int64_t i = 0; i < pairs; ++i) {
    cos[i] = all.cos[i * indexer.pair_step];
    sin[i] = all.sin[i * indexer.pair_step];
  }
  return {cos, sin};
}

// w H^-1/2 dim^-1/2 of all tokens: a strip of heads, in fp32.
inline void weigh_index_heads(const Pass& pass, const Indexer& indexer, std::int64_t strip) {
  const Workspace& work = pass.work;
  const Matrix& w = indexer.weights;
  const std::int64_t tokens = pass.step.tokens, first = strip * kStrip, count = least(kStrip, indexer.heads - first);
  const float of_heads = 1.0f / std::sqrt(static_cast<float>(indexer.heads));
  const float of_channels = 1.0f / std::sqrt(static_cast<float>(indexer.dim));
  float* out = pass.strip_out(tokens);
  multiply_strip(w, strip, work.hidden, pass.panels(w), out);
  for (std::int64_t t = 0; t < tokens; ++t) {
    float* weights = work.index_weights + t * indexer.heads + first;
    for (std::int64_t h = 0; h < count; ++h) weights[h] = out[t * kStrip + h] * of_heads * of_channels;
  }
}

// The index key of a token into the KV cache; its index queries, if any token needs them, rotated.
inline void finish_index_rows(const Pass& pass, const Attention& a, const Indexer& indexer, const IndexCache& cache,
                              std::int64_t token) {
  const Workspace& work = pass.work;
  const Rotation turn = rotation_of(pass, a, indexer, token);
  bf16* key = work.index_k + token * indexer.dim;
  layer_norm(indexer.k_norm, indexer.k_norm_bias, key, key);
  rotate(key, indexer.rope_dim, turn.cos, turn.sin, indexer.interleave);
  store_index_key(cache, key, indexer.dim, pass.step.slots[token]);
  if (work.choosers == 0) return;
  for (std::int64_t h = 0; h < indexer.heads; ++h) {
    bf16* q = work.index_q + (token * indexer.heads + h) * indexer.dim;
    rotate(q, indexer.rope_dim, turn.cos, turn.sin, indexer.interleave);
  }
}

inline IndexQueries index_queries_of(const Pass& pass, const Indexer& indexer, const IndexGroup& group) {
  const std::int64_t token = pass.step.sequences[group.sequence].first_token + group.token;
  return {pass.work.index_q + token * indexer.heads * indexer.dim, pass.work.index_weights + token * indexer.heads,
          group.tokens, indexer.heads, indexer.dim};
}

// The choice of token number `i` of a group, whose scores begin at `scores`.
inline void choose_of_group(const Pass& pass, const Attention& a, const IndexGroup& group, std::int64_t i,
                            float* scores) {
  const std::int64_t visible = pass.step.sequences[group.sequence].start + group.token + i + 1;
  std::int32_t* out = pass.work.choices + (group.choice + i) * a.topk;
  choose_tokens(scores + i * group.score_stride, visible, a.topk, pass.scratch, out);
}

// Scores and choices of a group on one thread.
inline void choose_alone(const Pass& pass, const Attention& a, const Indexer& indexer, const IndexCache& cache,
                         const IndexGroup& group) {
  const Sequence& sequence = pass.step.sequences[group.sequence];
  auto* scores = pass.scratch.get<float>(4, group.tokens * group.score_stride);
  score_index_keys(index_queries_of(pass, indexer, group), cache, sequence.pages, 0,
                   sequence.start + group.token + group.tokens, pass.scratch, scores, group.score_stride);
  for (std::int64_t i = 0; i < group.tokens; ++i) choose_of_group(pass, a, group, i, scores);
}

// Scores by ranges of keys on all threads, then choices by token.
inline void choose_together(const Pass& pass, const Attention& a, const Indexer& indexer, const IndexCache& cache) {
  const Workspace& work = pass.work;
  pass.each(static_cast<std::int64_t>(work.index_tasks.size()), [&](std::int64_t item) {
    const IndexTask& task = work.index_tasks[item];
    const IndexGroup& group = work.index_groups[task.group];
    score_index_keys(index_queries_of(pass, indexer, group), cache, pass.step.sequences[group.sequence].pages,
                     task.first, task.last, pass.scratch, work.index_scores + group.scores, group.score_stride);
  });
  pass.each(work.choosers, [&](std::int64_t row) {
    const IndexGroup* group = work.index_groups.data();
    while (row >= group->choice + group->tokens) ++group;
    choose_of_group(pass, a, *group, row - group->choice, work.index_scores + group->scores);
  });
}

inline void run_indexer(const Pass& pass, const Attention& a, const Indexer& indexer, const IndexCache& cache) {
  const Workspace& work = pass.work;
  const std::int64_t tokens = pass.step.tokens;
  const Product keys{&indexer.k, &work.hidden, work.index_k, indexer.dim};
  if (work.choosers == 0) {
    multiply_all(pass, {keys});
  } else {
    const Activations& input = a.q_a ? work.query_latent : work.hidden;
    multiply_all(pass, {{&indexer.q, &input, work.index_q, indexer.heads * indexer.dim}, keys});
  }
  const std::int64_t strips = work.choosers == 0 ? 0 : num_strips(indexer.weights);
  pass.each(strips + tokens, [&](std::int64_t item) {
    if (item < strips) return weigh_index_heads(pass, indexer, item);
    finish_index_rows(pass, a, indexer, cache, item - strips);
  });
  if (work.choosers == 0) return;
  if (!work.index_tasks.empty()) return choose_together(pass, a, indexer, cache);
  pass.each(static_cast<std::int64_t>(work.index_groups.size()),
            [&](std::int64_t g) { choose_alone(pass, a, indexer, cache, work.index_groups[g]); });
}

}  // namespace lowlat::LOWLAT_ISA
