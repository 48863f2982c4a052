// The function table of an instruction-set level, filled by level.cpp.
//
// Every function runs on a whole team of threads (thread_pool.h): each thread calls it with its own Team, and it
// returns when all threads are done. Rows and outputs are independent, so bits do not depend on the number of
// threads.
#pragma once

#include <cstdint>

#include "model.h"
#include "quantization.h"
#include "thread_pool.h"
#include "sampling.h"
#include "training.h"

namespace lowlat {

// Queries at positions start .. start + queries - 1 of one sequence over its KV cache entries of one layer.
//
// The heads form kv_heads groups that share a key and a value: group g's key is key_dim elements of an entry from g *
// key_step, its value value_dim elements from value_offset + g * value_step. Absorbed MLA is one group, whose key is
// the whole entry and whose value is the entry's start.
struct PagedAttention {
  const bf16* q = nullptr;  // [queries, heads, q_stride], zeros beyond key_dim; q_stride a multiple of 32
  std::int64_t queries = 0, heads = 0, q_stride = 0;
  Cache cache;
  std::int64_t entry_dim = 0;
  const std::int32_t* pages = nullptr;
  std::int64_t start = 0;
  std::int64_t kv_heads = 1;
  std::int64_t key_dim = 0, key_step = 0;
  std::int64_t value_dim = 0, value_step = 0, value_offset = 0;
  float scale = 1;
  std::int64_t window = 0;  // 0: all
  bf16* out = nullptr;      // [queries, heads, value_dim]
};

// The choice of sparse attention (DSA) for queries at positions start .. start + queries - 1 of one sequence, each of
// which sees more than topk keys.
struct TokenChoice {
  const bf16* q = nullptr;         // [queries, heads, dim]
  const float* weights = nullptr;  // [queries, heads], with the factor dim^-0.5
  std::int64_t queries = 0, heads = 0, dim = 0, topk = 0;
  IndexCache cache;
  const std::int32_t* pages = nullptr;
  std::int64_t start = 0;
  float* scores = nullptr;         // out [queries, score_stride], start + queries rounded up to 64
  std::int64_t score_stride = 0;
  std::int32_t* chosen = nullptr;  // out [queries, topk]: ascending positions
};

struct Workspace;

struct Ops {
  const char* name;

  // out [x.rows, w.rows] = x W^T in fp32
  void (*linear)(Team&, const Matrix& w, const Activations& x, float* out);

  // quantizes fp32 or bf16 weights, `stride` elements between rows, into the int8 or int4 tiles of `to`
  void (*pack)(Team&, const void* weights, bool is_bf16, std::int64_t stride, const Matrix& to);

  // out [w.rows, w.columns] = the weights of a matrix in GGUF blocks, exact in fp32, or rounded to bf16
  void (*dequantize)(Team&, const Matrix& w, float* out);
  void (*dequantize_to_bf16)(Team&, const Matrix& w, bf16* out);

  // scales of least weighted error, alone and with error feedback (quantization.h); on the calling thread
  void (*search_int4)(const ScaleSearch&);
  void (*search_int8)(const ScaleSearch&);
  void (*feedback_int4)(const ScaleSearch&);

  // rows in GGUF blocks, interleaved (matrix.h); out [rows rounded up to tiles, bytes of a row]
  void (*interleave)(Team&, const Matrix& rows, std::uint8_t* out);

  // x, out [rows, norm.size]
  void (*rms_norm)(Team&, const Norm& norm, const bf16* x, std::int64_t rows, bf16* out);

  // x [tokens, heads, dim] in place; cos, sin [tokens, dim / 2]
  void (*rotate)(Team&, bf16* x, std::int64_t tokens, std::int64_t heads, std::int64_t dim, const float* cos,
                 const float* sin, bool interleave);

  // gate, up, out [rows, size]
  void (*swiglu)(Team&, const bf16* gate, const bf16* up, std::int64_t rows, std::int64_t size, bf16* out);

  // scores [tokens, experts]: gate logits in, scores out; experts, weights [tokens, chosen]
  void (*route)(Team&, const Router& router, std::int64_t tokens, float* scores, std::int32_t* experts,
                float* weights);

  // rows [count, entry_dim] into the first entries of the cache
  void (*store_entries)(Team&, const bf16* rows, std::int64_t count, std::int64_t entry_dim, const Cache& cache);

  void (*attention)(Team&, const PagedAttention& attention);

  // keys [count, dim] into the first slots of the cache
  void (*store_index_keys)(Team&, const bf16* keys, std::int64_t count, std::int64_t dim, const IndexCache& cache);

  void (*choose_tokens)(Team&, const TokenChoice& choice);

  // Sampling: one token from a row of logits (sampling.h)
  void (*draw)(Team&, const DrawPass&);

  // Training: everything between two matrix products (training.h)
  void (*norm_forward)(Team&, const NormPass&);
  void (*norm_backward)(Team&, const NormPass&);
  void (*gated_forward)(Team&, const GatedPass&);
  void (*gated_backward)(Team&, const GatedPass&);
  void (*entropy)(Team&, const EntropyPass&);
  void (*divergence)(Team&, const DivergencePass&);
  void (*rotation)(Team&, const RotationPass&);
  void (*combine)(Team&, const CombinePass&);
  void (*grouped)(Team&, const GroupedPass&);
  void (*outer)(Team&, const OuterPass&);
  void (*causal_forward)(Team&, const CausalPass&);
  void (*causal_backward)(Team&, const CausalPass&);
  void (*indexer_loss)(Team&, const IndexerPass&);

  // A whole step of a model; work.prepare() must have been called for it.
  void (*step)(Team&, const Model& model, const Step& step, Workspace& work);
};

}  // namespace lowlat
