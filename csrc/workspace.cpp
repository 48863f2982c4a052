#include "workspace.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace lowlat {

namespace {

constexpr std::int64_t kQueryRows = 48;     // query rows that share one packing of the keys
constexpr std::align_val_t kAlignment{64};

std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

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
    if (layer.mlp) add_mlp(*layer.mlp);
    row = std::max(row, a.entry_dim());
    queries = std::max(queries, a.heads * a.query_dim());
    outputs = std::max(outputs, a.heads * a.out_dim());
    key = std::max(key, a.key_dim());
    value = std::max(value, a.is_mla() ? a.latent_dim : a.out_dim());
    if (a.q_a) query_latent = std::max(query_latent, a.q_a->weight.rows);
    std::int64_t& width = layer.moe ? inner : dense_inner;
    if (layer.mlp) width = std::max(width, layer.mlp->gate.weight.rows);
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
  row_token.resize(routed);
  row_weight.resize(routed);
  next_row.resize(sizes.experts);
  shrunk_stride = step.adapters.empty() ? 0 : sizes.rank;
  const std::int64_t most = std::max({std::int64_t{3}, a.heads, 2 * (sizes.chosen + 1)});
  shrunk = take<float>(18, n * most * shrunk_stride);
  // Head counts are equal in all layers, so one plan serves all.
  plan_attention(a, step, threads);
}

void Workspace::plan_attention(const Attention& a, const Step& step, int threads) {
  groups.clear();
  tasks.clear();
  expanded.clear();
  absorbed.clear();
  const std::int64_t kv_heads = a.is_mla() ? 1 : a.kv_heads;
  const std::int64_t heads = a.heads / kv_heads;
  const std::int64_t tokens = std::max<std::int64_t>(1, kQueryRows / heads);
  for (std::size_t s = 0; s < step.sequences.size(); ++s) {
    const Sequence& sequence = step.sequences[s];
    const auto number = static_cast<std::int32_t>(s);
    const bool expands = a.is_mla() && sequence.is_expanded;
    (expands ? expanded : absorbed).push_back(number);
    if (expands) continue;
    for (std::int64_t token = 0; token < sequence.length; token += tokens) {
      const std::int64_t count = std::min(tokens, sequence.length - token);
      const std::int64_t context = sequence.start + token + count;
      for (std::int64_t head = 0; head < kv_heads; ++head) {
        groups.push_back({number, head, token, count, num_splits(context), 0});
      }
    }
  }
  // Splits of a context run in parallel (split-K, as in flash decoding) only if there are too few groups to keep all
  // threads busy: their partial results take memory.
  const bool splits = groups.size() < 4 * static_cast<std::size_t>(threads);
  std::int64_t rows = 0;
  for (std::size_t g = 0; g < groups.size(); ++g) {
    const auto number = static_cast<std::int32_t>(g);
    if (!splits || groups[g].splits == 1) {
      groups[g].splits = 1;
      tasks.push_back({number, -1});
      continue;
    }
    groups[g].partial = rows;
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
