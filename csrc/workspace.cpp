#include "workspace.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace lowlat {

namespace {

constexpr std::int64_t kQueryRows = 48;     // query rows that share one packing of the keys
// Tokens that share a pass over the index keys: as many as this, but no more than these bytes hold scores of.
constexpr std::int64_t kIndexTokens = 64, kIndexScoreBytes = 16 << 20;
// Tokens whose reads of chosen entries are interleaved: as many as this, but no more than these bytes hold states of.
constexpr std::int64_t kInterleavedTokens = 16, kInterleavedBytes = 512 << 10;
constexpr std::int64_t kIndexBlock = 64;  // keys, a divisor of the keys of a task
constexpr std::align_val_t kAlignment{64};

std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

// New tokens of a sequence that attend to all tokens before them.
std::int64_t dense_tokens(const Attention& a, const Sequence& sequence) {
  return a.topk == 0 ? sequence.length : std::clamp<std::int64_t>(a.topk - sequence.start, 0, sequence.length);
}

}  // namespace

Sizes::Sizes(const Model& model) {
  const auto add_updates = [&](const std::vector<LowRank>& updates) {
    for (const LowRank& update : updates) rank = std::max(rank, update.rank);
  };
  const auto add_mlp = [&](const Mlp& mlp) {
    for (const Projection* p : {&mlp.gate, &mlp.up, &mlp.down}) add_updates(p->updates);
  };
  for (const Layer& layer : model.layers) {
    const Attention& a = layer.attention;
    for (const Projection* p : {&a.q, &a.k, &a.v, &a.kv_a, &a.o}) add_updates(p->updates);
    if (a.q_a) add_updates(a.q_a->updates);
    add_updates(a.kv_b_updates);
    if (a.indexer) {
      for (const Projection* p : {&a.indexer->q, &a.indexer->k}) add_updates(p->updates);
      index_queries = std::max(index_queries, a.indexer->heads * a.indexer->dim);
      index_key = std::max(index_key, a.indexer->dim);
      index_heads = std::max(index_heads, a.indexer->heads);
    }
    if (layer.mlp) add_mlp(*layer.mlp);
    row = std::max(row, a.entry_dim());
    queries = std::max(queries, a.heads * a.query_dim());
    outputs = std::max(outputs, a.heads * a.out_dim());
    key = std::max(key, a.key_dim());
    value = std::max(value, a.is_mla() ? a.latent_dim : a.out_dim());
    if (a.q_a) query_latent = std::max(query_latent, a.q_a->weight.rows);
    std::int64_t& width = layer.moe ? inner : dense_inner;
    if (layer.mlp) width = std::max({width, layer.mlp->gate.weight.rows, layer.mlp->down.weight.columns});
    if (!layer.moe) continue;
    experts = std::max(experts, layer.moe->router.experts);
    chosen = std::max(chosen, layer.moe->router.chosen);
    for (const Mlp& mlp : layer.moe->experts) {
      inner = std::max(inner, mlp.gate.weight.rows);
      add_mlp(mlp);
    }
  }
}

Buffer::~Buffer() { ::operator delete(data_, kAlignment); }

void* Buffer::reserve(std::size_t bytes) {
  if (bytes > bytes_) {
    ::operator delete(data_, kAlignment);
    data_ = nullptr;
    bytes_ = 0;
    // 128 spare bytes: vector loads may start at the last elements.
    data_ = ::operator new(bytes + 128, kAlignment);
    bytes_ = bytes;
    std::memset(data_, 0, bytes + 128);
  }
  return data_;
}

template <class T>
T* Workspace::take(int slot, std::int64_t count) {
  return static_cast<T*>(buffers_[slot].reserve(static_cast<std::size_t>(count) * sizeof(T)));
}

Activations Workspace::rows_of(int slot, std::int64_t rows, std::int64_t columns, bool is_decode) {
  const std::int64_t stride = round_up(columns, kGroup);
  return {rows, stride, take<bf16>(slot, rows * stride), is_decode};
}

void Workspace::make_inner(std::int64_t tokens, bool is_decode) {
  const std::int64_t dense_stride = round_up(sizes.dense_inner, kGroup), stride = round_up(sizes.inner, kGroup);
  const std::int64_t rows = sizes.inner > 0 ? tokens * (sizes.chosen + 1) : 0;
  bf16* values = take<bf16>(3, std::max(tokens * dense_stride, rows * stride));
  dense_inner = {tokens, dense_stride, values, is_decode};
  moe_inner = {rows, stride, values, is_decode};
}

void Workspace::prepare(const Model& model, const Step& step, int threads) {
  if (static_cast<int>(scratch.size()) < threads) scratch = std::vector<Scratch>(threads);
  const Attention& a = model.layers[0].attention;
  const std::int64_t n = step.tokens, routed = n * sizes.chosen;
  hidden = rows_of(0, n, model.hidden, step.is_decode);
  query_latent = rows_of(1, n, sizes.query_latent, step.is_decode);
  attended = rows_of(2, n, sizes.outputs, step.is_decode);
  make_inner(n, step.is_decode);
  // A single token's row serves all its experts without a copy.
  gathered = n > 1 ? rows_of(4, routed, model.hidden, step.is_decode) : Activations{};
  joined = model.mtp_input ? rows_of(17, n, 2 * model.hidden, step.is_decode) : Activations{};
  x = take<bf16>(5, n * hidden.stride);
  query_latent_raw = take<bf16>(6, n * query_latent.stride);
  row = take<bf16>(7, n * sizes.row);
  q = take<bf16>(8, n * sizes.queries);
  absorbed_stride = round_up(sizes.key, kGroup);
  mixed_stride = round_up(sizes.value, kGroup);
  absorbed_q = a.is_mla() ? take<bf16>(9, n * a.heads * absorbed_stride) : nullptr;
  mixed = a.is_mla() ? take<bf16>(10, n * a.heads * mixed_stride) : nullptr;
  gate_scores = take<float>(11, n * sizes.experts);
  chosen = take<std::int32_t>(12, routed);
  weights = take<float>(13, routed);
  if (!model.division.is_whole()) {
    all_attended = rows_of(24, n, model.division.tensor * sizes.outputs, step.is_decode);
    added = take<bf16>(25, n * model.hidden);
  }
  row_token.resize(routed);
  row_weight.resize(routed);
  next_row.resize(sizes.experts);
  row_places.resize(routed);
  if (model.counts_loads) loads.resize(model.layers.size() * sizes.experts);
  shrunk_stride = step.adapters.empty() ? 0 : sizes.rank;
  index_k = take<bf16>(19, n * sizes.index_key);
  const std::int64_t most = std::max({std::int64_t{4}, a.heads, 2 * (sizes.chosen + 1)});
  shrunk = take<float>(18, n * most * shrunk_stride);
  // Head counts are equal in all layers, so one plan serves all.
  plan_attention(a, step, threads);
}

// Interleaving pays off if enough groups are left to keep all threads busy.
std::int64_t Workspace::num_interleaved_tokens(const Attention& a, const Step& step, int threads) const {
  std::int64_t tokens = 0;
  for (const Sequence& sequence : step.sequences) tokens += sequence.length - dense_tokens(a, sequence);
  const std::int64_t state = round_up(a.heads, 16) * round_up(sizes.value, kGroup) * static_cast<std::int64_t>(sizeof(float));
  const std::int64_t interleaved = std::clamp<std::int64_t>(kInterleavedBytes / state, 1, kInterleavedTokens);
  return tokens < 4 * threads * interleaved ? 1 : interleaved;
}

void Workspace::plan_sequence(const Attention& a, const Step& step, std::int32_t number, std::int64_t interleaved) {
  const Sequence& sequence = step.sequences[number];
  const std::int64_t kv_heads = a.is_mla() ? 1 : a.kv_heads;
  const std::int64_t dense = dense_tokens(a, sequence);
  const bool expands = a.is_mla() && sequence.is_expanded && dense > 0;
  if (expands) expanded.push_back({number, dense});
  const std::int64_t first = expands ? dense : 0;
  const TokenRun run{sequence.first_token + first, sequence.length - first};
  if (run.tokens > 0 && !absorbed.empty() && absorbed.back().first + absorbed.back().tokens == run.first) {
    absorbed.back().tokens += run.tokens;
  } else if (run.tokens > 0) {
    absorbed.push_back(run);
  }
  const std::int64_t tokens = std::max<std::int64_t>(1, kQueryRows * kv_heads / a.heads);
  for (std::int64_t token = first; token < dense; token += tokens) {
    const std::int64_t count = std::min(tokens, dense - token);
    const std::int64_t context = sequence.start + token + count;
    for (std::int64_t head = 0; head < kv_heads; ++head) {
      groups.push_back({number, head, token, count, num_splits(context), 0});
    }
  }
  if (dense == sequence.length) return;
  const std::int64_t context = sequence.start + sequence.length, stride = round_up(context, kIndexBlock);
  const std::int64_t most = kIndexScoreBytes / static_cast<std::int64_t>(stride * sizeof(float));
  const std::int64_t group = std::clamp<std::int64_t>(most, 1, kIndexTokens);
  for (std::int64_t token = dense; token < sequence.length; token += group) {
    index_groups.push_back({number, token, std::min(group, sequence.length - token), choosers + token - dense, 0, stride});
  }
  for (std::int64_t token = dense; token < sequence.length; token += interleaved) {
    const std::int64_t count = std::min(interleaved, sequence.length - token);
    groups.push_back({number, 0, token, count, num_chosen_splits(a.topk), 0, choosers});
    choosers += count;
  }
}

void Workspace::plan_choices(const Attention& a, const Step& step, int threads) {
  choices = take<std::int32_t>(20, choosers * a.topk);
  index_q = take<bf16>(21, choosers > 0 ? step.tokens * sizes.index_queries : 0);
  index_weights = take<float>(22, choosers > 0 ? step.tokens * sizes.index_heads : 0);
  std::int64_t scores = 0;
  // Several threads share a group only if there are too few groups to keep all busy.
  const bool splits = index_groups.size() < 2 * static_cast<std::size_t>(threads);
  for (std::size_t g = 0; splits && g < index_groups.size(); ++g) {
    IndexGroup& group = index_groups[g];
    group.scores = scores;
    scores += group.tokens * group.score_stride;
    const std::int64_t context = step.sequences[group.sequence].start + group.token + group.tokens;
    const std::int64_t keys = round_up(std::max<std::int64_t>(context / (4 * threads), 1), kIndexBlock);
    for (std::int64_t key = 0; key < context; key += keys) {
      index_tasks.push_back({static_cast<std::int32_t>(g), key, std::min(key + keys, context)});
    }
  }
  index_scores = take<float>(23, scores);
}

void Workspace::plan_attention(const Attention& a, const Step& step, int threads) {
  groups.clear();
  tasks.clear();
  expanded.clear();
  absorbed.clear();
  index_groups.clear();
  index_tasks.clear();
  choosers = 0;
  const std::int64_t heads = a.is_mla() ? a.heads : a.heads / a.kv_heads;
  const std::int64_t interleaved = num_interleaved_tokens(a, step, threads);
  for (std::size_t s = 0; s < step.sequences.size(); ++s) {
    plan_sequence(a, step, static_cast<std::int32_t>(s), interleaved);
  }
  plan_choices(a, step, threads);
  // Splits of a context run in parallel (split-K, as in flash decoding) only if there are too few groups to keep all
  // threads busy: their partial results take memory.
  const bool splits = groups.size() < 4 * static_cast<std::size_t>(threads);
  std::int64_t rows = 0;
  split_rows = 0;
  for (std::size_t g = 0; g < groups.size(); ++g) {
    const auto number = static_cast<std::int32_t>(g);
    groups[g].split_row = split_rows;
    if (!splits || groups[g].splits == 1) {
      groups[g].splits = 1;
      tasks.push_back({number, -1});
      continue;
    }
    groups[g].partial = rows;
    split_rows += groups[g].tokens * heads;
    rows += groups[g].splits * groups[g].tokens * heads;
    for (std::int64_t split = 0; split < groups[g].splits; ++split) tasks.push_back({number, split});
  }
  // Longest task first: the last one to finish should be short.
  std::stable_sort(tasks.begin(), tasks.end(), [](const AttentionTask& one, const AttentionTask& other) {
    return one.split >= 0 && other.split >= 0 ? one.split > other.split : one.split < other.split;
  });
  value_stride = round_up(sizes.value, 32);
  top = take<float>(14, rows);
  total = take<float>(15, rows);
  values = take<float>(16, rows * value_stride);
}

}  // namespace lowlat
