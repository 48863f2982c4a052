// A decoder model, its paged KV cache and one step, as plain structs of pointers and dimensions that Python fills in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "matrix.h"

namespace lowlat {

struct Norm {
  const float* weight = nullptr;
  std::int64_t size = 0;
  float eps = 0;
};

// The low-rank update of a projection by a LoRA adapter: y += (x A^T) B^T. The adapter's scaling is part of B.
struct LowRank {
  std::int64_t rank = 0;    // 0: the adapter does not update this projection
  const bf16* a = nullptr;  // [rank, a_stride], zeros beyond the columns; a_stride a multiple of 32
  std::int64_t a_stride = 0;
  const bf16* b = nullptr;  // B transposed: [rank, b_stride], zeros beyond the rows, at least 32 of them
  std::int64_t b_stride = 0;
};

struct Projection {
  Matrix weight;
  const float* bias = nullptr;  // null: none
  std::vector<LowRank> updates;  // by adapter; empty: no adapter updates it
};

// SwiGLU: down(silu(gate x) * up x).
struct Mlp {
  Projection gate, up, down;
};

struct Router {
  Matrix weight;                // [experts, hidden]
  const float* bias = nullptr;  // null: none
  std::int64_t experts = 0;
  std::int64_t chosen = 0;
  std::int64_t groups = 1;
  std::int64_t kept_groups = 1;
  std::int64_t best_in_group = 2;  // a group's score is the sum of its best 1 or 2 experts
  bool is_sigmoid = true;
  bool normalizes = true;
  float scaling = 1;
};

struct Moe {
  Router router;
  // The expert of every place. Each process has as many consecutive places, by ascending expert; an expert with replicas
  // has several.
  std::vector<std::int32_t> places;
  std::vector<Mlp> experts;  // of this process's places
};

// Lightning indexer of sparse attention (DSA): its scores choose the tokens that a query attends to.
struct Indexer {
  std::int64_t heads = 0, dim = 0;
  std::int64_t rope_dim = 0;         // the first channels rotate, at every pair_step-th frequency of MLA's rotary key
  std::int64_t pair_step = 1;
  bool interleave = false;           // of the rotation
  Projection q;                      // [heads * dim, query latent], or of the layer's input without a query latent
  Projection k;                      // [dim, hidden]
  Norm k_norm;                       // LayerNorm
  const float* k_norm_bias = nullptr;
  Matrix weights;                    // [heads, hidden]
};

// MLA if latent_dim > 0, else GQA.
struct Attention {
  std::int64_t heads = 0;
  float scale = 0;
  bool interleave = false;
  std::int64_t rope_dim = 0;
  std::int64_t first_pair = 0;  // the layer's first column in Step's cos and sin
  std::int64_t window = 0;      // 0: all
  Projection q;             // q_proj, or q_b_proj if q_a is set
  Projection o;
  // MLA
  std::int64_t latent_dim = 0, nope_dim = 0, value_dim = 0;
  std::optional<Projection> q_a;
  Norm q_a_norm;
  Projection kv_a;
  std::vector<Norm> kv_a_norms;  // of consecutive parts of the latent; empty: no norm
  Matrix kv_b;  // [heads * (nope_dim + value_dim), latent_dim], row-major; [heads * value_dim, latent_dim] with k_b
  std::optional<Matrix> k_b;  // the keys' half of kv_b, each head transposed: [heads * latent_dim, nope_dim]
  std::vector<LowRank> kv_b_updates;  // of [heads * (nope_dim + value_dim), latent_dim], by adapter
  std::int64_t topk = 0;            // sparse attention: tokens that a query attends to; 0: all
  std::optional<Indexer> indexer;   // sparse attention without one attends to the previous layer's choice
  // GQA
  std::int64_t kv_heads = 0;
  Projection k, v;
  std::optional<Norm> q_norm, k_norm;

  bool is_mla() const { return latent_dim > 0; }
  std::int64_t key_dim() const { return is_mla() ? latent_dim + rope_dim : rope_dim; }
  std::int64_t query_dim() const { return is_mla() ? nope_dim + rope_dim : rope_dim; }
  std::int64_t out_dim() const { return is_mla() ? value_dim : rope_dim; }
  std::int64_t entry_dim() const { return is_mla() ? latent_dim + rope_dim : 2 * kv_heads * rope_dim; }
};

struct Layer {
  Norm input_norm, post_attention_norm;
  std::optional<Norm> post_mlp_norm;  // of the output of MLP or MoE, before it is added to the residual stream
  Attention attention;
  std::optional<Mlp> mlp;  // the dense MLP, or the shared experts
  std::optional<Moe> moe;
};

// Input of an MTP module: projection of (embedding_norm(e), hidden_norm(h)), for the embedding e of a later token and
// the hidden state h of the previous depth.
struct MtpInput {
  Norm embedding_norm, hidden_norm;
  Projection projection;  // [hidden, 2 hidden]
};

// The processes that divide the layers of a model. Tensor parallelism: this process has 1/tensor of the heads of every
// attention, and of the rows of output projections, MLPs and head. Expert parallelism: it has 1/experts of the routed
// experts, those of `expert_rank`.
struct Division {
  std::int64_t tensor = 1;
  std::int64_t experts = 1, expert_rank = 0;

  bool is_whole() const { return tensor == 1 && experts == 1; }
};

enum class DivisionGroup : int { tensor = 0, expert = 1 };

// All-gather among the processes of a group: every one sends `bytes` from `own`, and receives those of all, in order of
// their ranks.
class Exchange {
 public:
  virtual ~Exchange() = default;
  virtual void gather(DivisionGroup group, const void* own, std::size_t bytes, void* all) = 0;
};

// Consecutive layers of a decoder: all of them, one stage of a pipeline, or an MTP module.
struct Model {
  std::int64_t hidden = 0;
  std::optional<Matrix> embedding;  // [vocab, hidden], bf16 or GGUF blocks; none: Step::previous is the layers' input
  float embedding_scale = 1;        // factor on the embedding
  float residual_scale = 1;         // factor on what attention and MLP add to the residual stream
  std::optional<MtpInput> mtp_input;  // for an MTP module; without it the layers' input is the embedding
  std::vector<Layer> layers;
  Division division;
  std::int64_t first_layer = 0;  // the index of layers[0] among the cache's layers
  std::optional<Norm> norm;        // none: a stage before the last, whose output is the residual stream
  std::optional<Projection> head;  // [vocab, hidden], or this process's part of the rows; comes with norm
  bool counts_loads = false;           // of experts (EPLB)
  bool is_larger_than_memory = false;  // weights exceed memory and are read from their files repeatedly
};

// The paged KV cache of a layer: the entry at row r of page p begins at data + (p * page_size + r) * row_bytes. A
// bf16 entry is its elements. An int8 entry is `quantized` int8 channels padded to 4 bytes, an fp32 scale per 64 of
// them, then the other elements in bf16.
struct Cache {
  std::uint8_t* data = nullptr;
  std::int64_t row_bytes = 0;
  std::int64_t page_size = 0;
  std::int64_t quantized = 0;  // 0: bf16
};

// The index keys of a layer with an indexer, in the same pages, in int8 with one scale per key. Tiles of 16 consecutive
// tokens are packed operands of the scores: a vector for every 4 channels, 4 bytes of value + 128 per token, then one of
// fp32 scales.
struct IndexCache {
  std::uint8_t* data = nullptr;  // null: the layer has no indexer
  std::int64_t tile_bytes = 0;
  std::int64_t page_size = 0;    // a multiple of 16
};

struct Sequence {
  const std::int32_t* pages = nullptr;
  std::int64_t start = 0;        // entries cached before this step
  std::int64_t length = 0;       // new tokens
  std::int64_t first_token = 0;  // index in the step
  bool is_expanded = false;      // MLA takes the expanded path: keys and values per head
  std::int32_t adapter = -1;     // the LoRA adapter of all its tokens, -1: none
};

// One step: the new tokens of several sequences, concatenated.
struct Step {
  std::int64_t tokens = 0;
  const std::int64_t* ids = nullptr;    // [tokens]
  const bf16* previous = nullptr;       // [tokens, hidden]: with a MtpInput, hidden states of the previous depth; without
                                        // an embedding, the residual stream of the previous stage
  const std::int64_t* slots = nullptr;  // [tokens]: page * page_size + row
  const float* cos = nullptr;           // [tokens, pairs]: a layer's columns begin at its first_pair
  const float* sin = nullptr;
  std::int64_t pairs = 0;
  const float* query_scale = nullptr;   // [tokens]: factor on a token's queries; null: none
  std::vector<Sequence> sequences;
  std::vector<std::int32_t> adapters;   // [tokens]: the token's LoRA adapter or -1; empty: no token has one
  const Cache* caches = nullptr;        // one per layer of the model, with the same page table
  const IndexCache* index_caches = nullptr;  // likewise
  bool is_decode = false;               // every sequence decodes, see Activations
  bf16* hidden = nullptr;               // out [tokens, hidden], after the final norm if the model has one
  bf16* residuals = nullptr;            // out [2 layers + 1, tokens, hidden]: the residual stream before every attention
                                        // and every MLP, and after the last; null: not kept
  std::int32_t* experts = nullptr;      // out [layers, tokens, chosen], best first; layers without experts write none
  float* gates = nullptr;               // out, the factors on their outputs; null: routing is not kept
  std::vector<std::int64_t> wanted;     // tokens that need logits
  float* logits = nullptr;              // out [wanted, vocab]
  std::int64_t vocab = 0;
  Exchange* exchange = nullptr;         // of a divided model
};

}  // namespace lowlat
