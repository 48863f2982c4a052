// Memory of a step: activations shared by the team, scratch of each thread, and the plan of its attention.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "model.h"

namespace lowlat {

// Memory aligned to 64 bytes that only grows. Fresh memory is zero; what it held before growing is lost.
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

// The start of a buffer that has room for `count` of T.
template <class T>
T* room(Buffer& buffer, std::int64_t count) {
  return static_cast<T*>(buffer.reserve(static_cast<std::size_t>(count) * sizeof(T)));
}

// A thread's own buffers, by number.
class Scratch {
 public:
  static constexpr int kSlots = 16;
  template <class T>
  T* get(int slot, std::int64_t count) {
    return room<T>(slots_[slot], count);
  }

 private:
  Buffer slots_[kSlots];
};

// A context is attended to split by split, and the splits are added up in order: where they begin is fixed by the
// position alone, so that a query's bits are. Each of the first is as long as all before it, so that two threads have
// even shares of a short context: 0, 64, 128, 256, 512, 1024, and from there every 1024.
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

// Query rows of one sequence that share keys: `tokens` queries from `token` (of the sequence) on, all heads of one
// key-value head. Their partial results lie at row `partial`, one copy per split.
struct QueryGroup {
  std::int32_t sequence;
  std::int64_t kv_head;
  std::int64_t token;
  std::int64_t tokens;
  std::int64_t splits;
  std::int64_t partial;
};

// A group and one of its splits, or -1: all of them in turn.
struct AttentionTask {
  std::int32_t group;
  std::int64_t split;
};

// Rows of tokens that one MLP works on.
struct ExpertRows {
  const Mlp* mlp;
  std::int64_t first;
  std::int64_t rows;
  bool is_routed;
};

// The largest sizes of a model's layers.
struct Sizes {
  std::int64_t query_latent = 0, experts = 0, chosen = 0;
  std::int64_t dense_inner = 0, inner = 0;  // of layers without experts, and with
  std::int64_t row = 0, queries = 0, outputs = 0, key = 0, value = 0;

  explicit Sizes(const Model& model);
};

// The memory of one model's steps.
struct Workspace {
  // Activations of all tokens; strides are multiples of 32 and the same in all layers, those of the widest. A layer's
  // rows are followed by zeros up to a multiple of 32.
  Activations hidden, query_latent, attended, gathered, joined;
  // Inner rows of MLPs, in the same memory: a layer without experts has fewer rows, as a rule wider ones.
  Activations dense_inner, moe_inner;
  Activations inner;  // those of the layer at hand
  bf16* x = nullptr;                 // residual [tokens, hidden.stride]
  bf16* query_latent_raw = nullptr;  // [tokens, query_latent.stride]
  bf16* row = nullptr;               // [tokens, row_dim]
  bf16* q = nullptr;                 // [tokens, heads, query_dim]
  bf16* absorbed_q = nullptr;        // [tokens, heads, absorbed_stride]
  bf16* mixed = nullptr;             // [tokens, heads, mixed_stride]
  std::int64_t absorbed_stride = 0, mixed_stride = 0;
  // Attention
  std::vector<QueryGroup> groups;
  std::vector<AttentionTask> tasks;
  std::vector<std::int32_t> expanded;  // sequences in the expanded form
  std::vector<std::int32_t> absorbed;  // and the others
  float* top = nullptr;                // partial softmax states, [rows]
  float* total = nullptr;
  float* values = nullptr;  // [rows, value_stride]
  std::int64_t value_stride = 0;
  // Experts
  float* gate_scores = nullptr;    // [tokens, experts]
  std::int32_t* chosen = nullptr;  // [tokens, chosen]
  float* weights = nullptr;        // [tokens, chosen]
  std::vector<ExpertRows> expert_rows;
  std::vector<std::int32_t> row_token;
  std::vector<float> row_weight;
  std::vector<std::int64_t> next_row;  // per expert

  std::vector<Scratch> scratch;  // per thread

  explicit Workspace(const Model& model) : sizes(model) {}

  // Makes everything ready for a step of `threads` threads.
  void prepare(const Model& model, const Step& step, int threads);

 private:
  void plan_attention(const Attention& attention, const Step& step, int threads);
  template <class T>
  T* take(int slot, std::int64_t count);
  Activations rows_of(int slot, std::int64_t rows, std::int64_t columns, bool is_stream);
  void make_inner(std::int64_t tokens, bool is_stream);

  Sizes sizes;
  Buffer buffers_[18];
};

}  // namespace lowlat
