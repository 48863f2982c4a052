// Arguments of the training kernels: forward and backward passes of everything between two matrix products (RMSNorm,
// SwiGLU, RoPE, cross entropy, KL divergence, attention, indexer loss, grouped GEMM). Activations are bf16 or fp32, one
// type per call; sums and values saved for the backward pass are fp32.
#pragma once

#include <cstdint>

namespace lowlat {

class Buffer;

// Values of either type.
struct Values {
  void* data = nullptr;
  bool is_bf16 = false;
};

struct NormPass {
  std::int64_t rows = 0, size = 0;
  float eps = 0;
  const float* weight = nullptr;
  Values x;
  Values out;                      // forward: the result; backward: the gradient of x
  float* inverse = nullptr;        // [rows] 1 / root mean square: written by forward, read by backward
  Values grad;                     // backward: the gradient of the result
  float* grad_weight = nullptr;    // backward: [size]
  float* partial = nullptr;        // backward: [ceil(rows / kNormPiece), size]
};

// Rows per partial sum of a weight's gradient: the summation order, and so the bits, do not depend on threads.
constexpr std::int64_t kNormPiece = 64;

struct GatedPass {
  std::int64_t rows = 0, size = 0;
  std::int64_t stride = 0;          // elements between rows of gate, up and their gradients
  Values gate, up;
  Values inner;                     // [rows, size] silu(gate) * up; backward: null if not needed
  Values grad;                      // backward: [rows, size] gradient of inner, before factors
  const float* factors = nullptr;   // backward: [rows] multiplied into grad; null: 1
  Values grad_gate, grad_up;        // backward
  float* grad_factors = nullptr;    // backward: [rows] sums of grad * inner; null if not needed
};

struct EntropyPass {
  std::int64_t rows = 0, size = 0;
  Values logits;                        // in place: the gradient of nll + z_weight * z
  const std::int64_t* targets = nullptr;
  const bool* counted = nullptr;        // rows with false have no gradient and no loss
  float z_weight = 0;
  float* nll = nullptr;                 // [rows] nats
  float* z = nullptr;                   // [rows] squared log of the denominator
};

// KL divergence (forward) of a student's next-token distributions from a teacher's, and the negative log-likelihood
// of targets.
struct DivergencePass {
  std::int64_t rows = 0, size = 0;
  Values logits;                        // the student's; in place: the gradient of kl + nll_weight * nll
  Values teacher;                        // [rows, size] the teacher's logits
  const std::int64_t* targets = nullptr;
  const bool* counted = nullptr;        // rows with false have no gradient and no loss
  float nll_weight = 0;
  bool wants_gradient = true;           // false: logits are not overwritten
  float* kl = nullptr;                  // [rows] nats
  float* nll = nullptr;                 // [rows] nats
};

// RoPE of heads whose rows may be columns of a wider matrix.
struct RotationPass {
  std::int64_t tokens = 0, heads = 0, dim = 0;
  Values x;
  std::int64_t token_step = 0, head_step = 0;  // elements of x between tokens and between heads
  Values out;                                  // [tokens, heads, dim]
  const float* cos = nullptr;                  // [tokens, dim / 2], rows `table_step` apart; sin alike
  const float* sin = nullptr;
  std::int64_t table_step = 0;
  bool interleave = false;                     // pairs (2i, 2i + 1); otherwise (i, i + dim / 2)
  bool is_inverse = false;                     // rotate by the negative angles: the gradient of x from that of out
};

struct CombinePass {
  std::int64_t tokens = 0, chosen = 0, size = 0;
  Values rows;                           // [any, size]
  const float* factors = nullptr;        // [any]; null: 1
  const std::int64_t* places = nullptr;  // [tokens, chosen] rows of each token, added in this order
  Values out;                            // [tokens, size]
};

// Grouped GEMM: rows sorted by expert, each times its expert's matrix: x W^T, or transposed: x W.
struct GroupedPass {
  std::int64_t experts = 0, out = 0, in = 0;
  const std::int64_t* counts = nullptr;  // [experts] rows per expert, in order
  Values weight;                         // [experts, out, in]
  bool is_transposed = false;
  const std::uint16_t* rows = nullptr;   // bf16 [any, in]; transposed: [any, out]
  std::uint16_t* products = nullptr;     // bf16 [any, out]; transposed: [any, in]
};

// Weight gradient of the grouped GEMM: left^T right over the rows of every expert.
struct OuterPass {
  std::int64_t experts = 0, out = 0, in = 0;
  const std::int64_t* counts = nullptr;  // [experts]
  const std::uint16_t* left = nullptr;   // bf16 [any, out]
  const std::uint16_t* right = nullptr;  // bf16 [any, in]
  float* sums = nullptr;                 // [experts, out, in]
};

// Causal attention of packed whole sequences (varlen attention). bf16; heads / kv_heads query heads share a key
// head (GQA).
struct CausalPass {
  std::int64_t sequences = 0;
  const std::int64_t* ends = nullptr;  // [sequences] cumulative token counts (cu_seqlens without the 0)
  std::int64_t heads = 0, kv_heads = 0, key_dim = 0, value_dim = 0;
  float scale = 1;
  const std::uint16_t* q = nullptr;     // [tokens, heads, key_dim]
  const std::uint16_t* k = nullptr;     // [tokens, kv_heads, key_dim]
  const std::uint16_t* v = nullptr;     // [tokens, kv_heads, value_dim]
  std::uint16_t* out = nullptr;         // [tokens, heads, value_dim]
  float* log_total = nullptr;           // [tokens, heads] logsumexp: written by forward, read by backward
  const std::uint16_t* grad = nullptr;  // backward: [tokens, heads, value_dim]
  std::uint16_t* grad_q = nullptr;      // backward, shaped like q, k and v
  std::uint16_t* grad_k = nullptr;
  std::uint16_t* grad_v = nullptr;
};

// KL divergence of the indexer (DSA) from causal attention over packed whole sequences, and the gradients of the outputs
// of the indexer. bf16; index heads share one key.
struct IndexerPass {
  std::int64_t sequences = 0;
  const std::int64_t* ends = nullptr;  // [sequences] cumulative token counts
  std::int64_t heads = 0, kv_heads = 0, key_dim = 0, value_dim = 0, index_heads = 0, index_dim = 0, topk = 0;
  float scale = 1, index_scale = 1;
  float weight = 1;                            // of the divergence in the gradients
  const std::uint16_t* q = nullptr;            // [tokens, heads, key_dim]
  const std::uint16_t* k = nullptr;            // [tokens, kv_heads, key_dim]
  const float* log_total = nullptr;            // [tokens, heads] logsumexp, of causal_forward
  const std::uint16_t* index_q = nullptr;      // [tokens, index_heads, index_dim]
  const float* index_weights = nullptr;        // [tokens, index_heads]
  const std::uint16_t* index_k = nullptr;      // [tokens, index_dim]
  const std::uint16_t* v = nullptr;            // [tokens, kv_heads, value_dim], if there is `out`
  std::uint16_t* out = nullptr;                // [tokens, heads, value_dim] attention over the chosen tokens; null: none
  float* kl = nullptr;                         // [tokens] nats
  float* recall = nullptr;                     // [tokens] share of the attention on the topk chosen tokens
  std::uint16_t* grad_q = nullptr;             // shaped like index_q; null: no gradients
  float* grad_weights = nullptr;               // shaped like index_weights
  std::uint16_t* grad_k = nullptr;             // shaped like index_k
  Buffer* panels = nullptr;                    // memory that the threads share
  Buffer* sums = nullptr;
};

}  // namespace lowlat
