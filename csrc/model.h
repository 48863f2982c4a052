// A decoder as the native code sees it: pointers to weights and dimensions, put together once by Python.
#pragma once

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

struct Projection {
  Matrix weight;
  const float* bias = nullptr;  // null: none
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
  std::int64_t best_in_group = 2;  // experts whose scores make a group's score
  bool is_sigmoid = true;
  bool normalizes = true;
  float scaling = 1;
};

struct Moe {
  Router router;
  std::vector<Mlp> experts;
};

// MLA where latent_dim > 0, else GQA.
struct Attention {
  std::int64_t heads = 0;
  float scale = 0;
  bool interleave = false;
  std::int64_t rope_dim = 0;
  std::int64_t first_pair = 0;  // of the layer's columns in Step's cos and sin
  std::int64_t window = 0;      // 0: all
  Projection q;             // q_proj, or q_b_proj where q_a is there
  Projection o;
  // MLA
  std::int64_t latent_dim = 0, nope_dim = 0, value_dim = 0;
  std::optional<Projection> q_a;
  Norm q_a_norm;
  Projection kv_a;
  std::vector<Norm> kv_a_norms;  // of the parts of the latent, one after the other; none: as it is
  Matrix kv_b;  // [heads * (nope_dim + value_dim), latent_dim], row by row
  // GQA
  std::int64_t kv_heads = 0;
  Projection k, v;
  std::optional<Norm> q_norm, k_norm;

  bool is_mla() const { return latent_dim > 0; }
  std::int64_t key_dim() const { return is_mla() ? latent_dim + rope_dim : rope_dim; }
  std::int64_t query_dim() const { return is_mla() ? nope_dim + rope_dim : rope_dim; }
  std::int64_t out_dim() const { return is_mla() ? value_dim : rope_dim; }
  std::int64_t row_dim() const { return is_mla() ? latent_dim + rope_dim : 2 * kv_heads * rope_dim; }
};

struct Layer {
  Norm input_norm, post_attention_norm;
  Attention attention;
  std::optional<Mlp> mlp;  // the dense MLP, or the shared experts
  std::optional<Moe> moe;
};

// How an MTP module begins: projection (embedding_norm e, hidden_norm h) of the embedding e of a later token and the
// hidden state h of the depth before.
struct Join {
  Norm embedding_norm, hidden_norm;
  Projection projection;  // [hidden, 2 hidden]
};

struct Model {
  std::int64_t hidden = 0;
  std::int64_t vocab = 0;
  const bf16* embedding = nullptr;  // [vocab, hidden]
  std::optional<Join> join;         // of an MTP module; without one the layers are given the embedding
  std::vector<Layer> layers;
  std::int64_t first_layer = 0;  // of the cache's
  Norm norm;
  Projection head;
  bool is_larger_than_memory = false;  // weights are read from their files again and again
};

// The paged cache of a layer: row r of page p at data + (p * page_size + r) * row_bytes.
// bf16: the row's elements. int8: `quantized` channels as int8, padded to 4 bytes, an fp32 scale for each 64 of them,
// then the other elements in bf16.
struct Cache {
  std::uint8_t* data = nullptr;
  std::int64_t row_bytes = 0;
  std::int64_t page_size = 0;
  std::int64_t quantized = 0;  // 0: bf16
};

struct Sequence {
  const std::int32_t* pages = nullptr;
  std::int64_t start = 0;        // rows cached before this step
  std::int64_t length = 0;       // new tokens
  std::int64_t first_token = 0;  // of the step
  bool is_expanded = false;      // MLA: keys and values are built per head
};

// One step: the tokens of several sequences, one after the other.
struct Step {
  std::int64_t tokens = 0;
  const std::int64_t* ids = nullptr;    // [tokens]
  const bf16* previous = nullptr;       // with a Join: [tokens, hidden], hidden states of the depth before
  const std::int64_t* slots = nullptr;  // [tokens]: page * page_size + row
  const float* cos = nullptr;           // [tokens, pairs]: a layer's own start at its first_pair
  const float* sin = nullptr;
  std::int64_t pairs = 0;
  std::vector<Sequence> sequences;
  const Cache* caches = nullptr;        // of each of the model's layers; pages are the same in all
  bool is_stream = false;               // every sequence has few new tokens, see Activations
  bf16* hidden = nullptr;               // out [tokens, hidden], after the final norm
  std::vector<std::int64_t> wanted;     // tokens whose logits are asked for
  float* logits = nullptr;              // out [wanted, vocab]
};

}  // namespace lowlat
