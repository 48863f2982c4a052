// Memory of a step: shared activations, per-thread scratch, and the attention plan (flash-decoding splits).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "model.h"

namespace lowlat {

// Grow-only memory aligned to 64 bytes. Fresh memory is zero; growing loses the contents.
class Buffer {
 public:
  Buffer() = default;
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* reserve(std::size_t bytes);

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

// The start of `buffer`, grown to hold at least `count` elements.
template <class T>
T* buffer_array(Buffer& buffer, std::int64_t count) {
  return static_cast<T*>(buffer.reserve(static_cast<std::size_t>(count) * sizeof(T)));
}

// A thread's own buffers, by slot.
class Scratch {
 public:
  static constexpr int kSlots = 16;
  template <class T>
  T* get(int slot, std::int64_t count) {
    return buffer_array<T>(slots_[slot], count);
  }

 private:
  Buffer slots_[kSlots];
};

// Flash decoding (split-KV): a context is attended split by split, and the partial results are added in order. Split
// boundaries depend on the position alone, and so do a query's bits. Early splits double, so that two threads get even
// shares of a short context: 0, 64, 128, 256, 512, 1024, then every 1024.
constexpr std::int64_t kFirstSplit = 64, kSplit = 1024, kShortSplits = 5;

inline std::int64_t split_start(std::int64_t split) {
  if (split == 0) return 0;
  return split <= kShortSplits ? kFirstSplit << (split - 1) : kSplit * (split - kShortSplits + 1);
}

inline std::int64_t num_splits(std::int64_t context) {
  if (context > kSplit) return kShortSplits + (context - 1) / kSplit;
  std::int64_t splits = 0;
  while (split_start(splits) < context) ++splits;
  return splits;
}

// Of a context that a token chose (sparse attention): one every kSplit entries.
inline std::int64_t num_chosen_splits(std::int64_t topk) { return (topk + kSplit - 1) / kSplit; }

// Query rows of one sequence that share keys: `tokens` queries from `token` (within the sequence), all heads of one
// KV head. Their partial results begin at row `partial`, one copy per split. With sparse attention, tokens that chose
// their contexts are groups of their own: the positions of the first are row `choice` of the choices.
struct QueryGroup {
  std::int32_t sequence;
  std::int64_t kv_head;
  std::int64_t token;
  std::int64_t tokens;
  std::int64_t splits;
  std::int64_t partial;
  std::int64_t choice = -1;  // -1: dense
  std::int64_t split_row = 0;  // query rows of the split groups before this one
};

// Consecutive tokens of the step.
struct TokenRun {
  std::int64_t first, tokens;
};

// The first `queries` new tokens of a sequence.
struct ExpandedQueries {
  std::int32_t sequence;
  std::int64_t queries;
};

// Consecutive tokens of a sequence that choose their context, from `token` (within the sequence); their rows of the
// choices begin at `choice`. They share passes over the index keys. If scored by several threads, their scores are
// [tokens, score_stride] from `scores`.
struct IndexGroup {
  std::int32_t sequence;
  std::int64_t token, tokens, choice;
  std::int64_t scores = 0, score_stride = 0;
};

// Index keys [first, last) for a group.
struct IndexTask {
  std::int32_t group;
  std::int64_t first, last;
};

// A group and one of its splits, or -1: all of them in order.
struct AttentionTask {
  std::int32_t group;
  std::int64_t split;
};

// Token rows for one MLP.
struct ExpertRows {
  const Mlp* mlp;
  std::int64_t first;
  std::int64_t rows;
  bool is_routed;
  std::int64_t sent = 0;  // first row of this process's outputs
};

// The process that computes a routed row, and the row's number among those of the process.
struct RowPlace {
  std::int64_t rank;
  std::int64_t number;
};

// The largest dimensions over a model's layers.
struct Sizes {
  std::int64_t query_latent = 0, experts = 0, chosen = 0;
  std::int64_t dense_inner = 0, inner = 0;  // of layers without experts, and with
  std::int64_t row = 0, queries = 0, outputs = 0, key = 0, value = 0;
  std::int64_t rank = 0;  // of LoRA adapters
  std::int64_t index_queries = 0, index_key = 0, index_heads = 0;

  explicit Sizes(const Model& model);
};

// The buffers of one model's steps.
struct Workspace {
  // Activations of all tokens. Strides are multiples of 32 and equal in all layers: those of the widest. Zeros follow
  // a narrower layer's rows up to a multiple of 32.
  Activations hidden, query_latent, attended, gathered, joined;
  // MLP inner rows share memory: a layer without experts usually has fewer but wider rows.
  Activations dense_inner, moe_inner;
  Activations inner;  // of the current layer
  bf16* x = nullptr;                 // residual stream [tokens, hidden.stride]
  bf16* query_latent_raw = nullptr;  // [tokens, query_latent.stride]
  bf16* row = nullptr;               // [tokens, entry_dim]
  bf16* q = nullptr;                 // [tokens, heads, query_dim]
  bf16* absorbed_q = nullptr;        // [tokens, heads, absorbed_stride]
  bf16* mixed = nullptr;             // [tokens, heads, mixed_stride]
  std::int64_t absorbed_stride = 0, mixed_stride = 0;
  // Attention
  std::vector<QueryGroup> groups;
  std::vector<AttentionTask> tasks;
  std::int64_t split_rows = 0;            // query rows of the groups with several splits
  std::vector<ExpandedQueries> expanded;  // on the expanded path
  std::vector<TokenRun> absorbed;         // all other tokens
  float* top = nullptr;                // partial softmax states: row maximum, [rows]
  float* total = nullptr;
  float* values = nullptr;  // [rows, value_stride]
  std::int64_t value_stride = 0;
  // Sparse attention; unused in steps of which no token has more than topk before it
  std::vector<IndexGroup> index_groups;
  std::vector<IndexTask> index_tasks;  // empty: each group on one thread
  std::int64_t choosers = 0;           // tokens of index_groups
  bf16* index_q = nullptr;             // [tokens, index heads, index dim]
  bf16* index_k = nullptr;             // [tokens, index dim]
  float* index_weights = nullptr;      // [tokens, index heads]
  float* index_scores = nullptr;       // of the groups with tasks
  std::int32_t* choices = nullptr;     // [choosers, topk]: ascending positions, until the next layer that chooses
  // Experts
  float* gate_scores = nullptr;    // [tokens, experts]
  std::int32_t* chosen = nullptr;  // [tokens, chosen]
  float* weights = nullptr;        // [tokens, chosen]
  std::vector<ExpertRows> expert_rows;
  std::vector<std::int32_t> row_token;
  std::vector<float> row_weight;
  std::vector<std::int64_t> next_row;  // per expert
  std::int64_t routed = 0;                       // rows of all experts
  std::vector<RowPlace> row_places;              // per routed row
  std::vector<std::int64_t> replicas, replica;   // per expert: its places, and those that have their rows
  std::vector<std::int64_t> loads;               // [layers, experts]: rows of every expert in all counted steps; empty: none

  // x A^T of the updates of LoRA adapters, shrunk_stride apart: by product and token, by token and head, or by row of
  // the experts.
  float* shrunk = nullptr;
  std::int64_t shrunk_stride = 0;

  // Of a divided model: what an exchange sends and receives, the heads of all processes, and what a projection adds to
  // the residual stream.
  Buffer sent, received;
  Activations all_attended;
  bf16* added = nullptr;                // [tokens, hidden]
  std::vector<std::int64_t> rank_rows;  // routed rows of every process

  std::vector<Scratch> scratch;  // per thread

  explicit Workspace(const Model& model) : sizes(model) {}

  // Most experts of a layer.
  std::int64_t experts() const { return sizes.experts; }

  // Reserves memory for a step on `threads` threads and plans its attention.
  void prepare(const Model& model, const Step& step, int threads);

 private:
  void plan_attention(const Attention& attention, const Step& step, int threads);
  void plan_sequence(const Attention& attention, const Step& step, std::int32_t number, std::int64_t interleaved);
  std::int64_t num_interleaved_tokens(const Attention& attention, const Step& step, int threads) const;
  void plan_choices(const Attention& attention, const Step& step, int threads);
  template <class T>
  T* take(int slot, std::int64_t count);
  Activations rows_of(int slot, std::int64_t rows, std::int64_t columns, bool is_decode);
  void make_inner(std::int64_t tokens, bool is_decode);

  Sizes sizes;
  Buffer buffers_[26];
};

}  // namespace lowlat
