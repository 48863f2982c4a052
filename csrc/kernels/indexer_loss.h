// Loss of the indexer of sparse attention (DSA) in its dense warm-up: KL(p || softmax I) of every query, where p is the
// attention summed over heads and normalised, and I the index scores; with the gradients of the indexer's outputs. And
// the attention over the chosen tokens, without gradients.
//
// 64 queries at a time. Scores are recomputed from the logsumexp of the forward pass, and never stored for a whole
// sequence. Query blocks are dealt to kPieces pieces, each with its own sums of key gradients, which are added in
// order: bits do not depend on the number of threads.
#pragma once

#include <vector>

#include "choose_tokens.h"
#include "flash_attention_training.h"

namespace lowlat::LOWLAT_ISA::indexer {

using causal::blocks_of;
using causal::HeadPanels;
using causal::kBlock;

constexpr std::int64_t kPieces = 16;
constexpr float kLeastPositive = 1.17549435e-38f;
constexpr float kMostFinite = 3.40282347e38f;

// Scratch of a thread.
struct Memory {
  Buffer q, index_q, products, attention, scores, mask, slopes, transposed, grad_q, query_panels, weights, mixed, totals;
  Scratch choice;
};

// One sequence: its keys as panels, of all threads, and the sums of key gradients.
struct Sequence {
  std::int64_t start = 0, length = 0;
  std::vector<HeadPanels> keys, values;  // of every KV head
  HeadPanels index_keys;
  float* grad_k = nullptr;  // [kPieces, length, stride]
  std::int64_t stride = 0;

  float* piece_grad_k(std::int64_t piece) const { return grad_k + piece * length * stride; }
};

// A block of queries, and the rows of its scores: `width` floats apart.
struct QueryBlock {
  std::int64_t start, rows, seen, width;
  float* attention;  // [rows, width] exp(score - logsumexp), summed over heads
  float* scores;     // [rows, width] index scores, then the gradient of the loss
  float* mask;       // [rows, width] 1 for the chosen tokens
  const bf16* index_q;  // [rows * index_heads, index_dim rounded up to 32]
  float* products;      // [rows * index_heads, 64]

  std::int64_t blocks() const { return blocks_of(seen); }
  std::int64_t count(std::int64_t row) const { return seen - rows + row + 1; }  // keys that a query sees
};

// w of a query's head, with the factor index_dim^-0.5 of its scores.
inline float head_weight(const IndexerPass& p, std::int64_t token, std::int64_t head) {
  return p.index_weights[token * p.index_heads + head] * p.index_scale;
}

// Attention over the chosen tokens: sums over keys, of all heads.
struct Mixed {
  float* values;  // [heads, kBlock, stride]
  float* totals;  // [heads, kBlock]
  bf16* weights;  // [kBlock, kBlock] of a block of keys
  std::int64_t stride;
};

inline void add_chosen(const IndexerPass& p, const Sequence& s, const QueryBlock& b, std::int64_t block, std::int64_t h,
                       const Mixed& mixed) {
  for (std::int64_t r = 0; r < b.rows; ++r) {
    F weight[kBlock / kTile], total = zero();
    for (int i = 0; i < kBlock / kTile; ++i) {
      const F chosen = load(b.mask + r * b.width + block * kBlock + i * kTile);
      weight[i] = mul(load(b.products + r * kBlock + i * kTile), chosen);
      total = add(total, weight[i]);
    }
    store_pairs(mixed.weights + r * kBlock, pairs_in_order(weight[0], weight[1]));
    store_pairs(mixed.weights + r * kBlock + 32, pairs_in_order(weight[2], weight[3]));
    mixed.totals[h * kBlock + r] += sum(total);
  }
  float* to = mixed.values + h * kBlock * mixed.stride;
  causal::times_block(s.values[h * p.kv_heads / p.heads], block, mixed.weights, b.rows, to, mixed.stride);
}

inline Mixed new_mixed(const IndexerPass& p, Memory& memory) {
  Mixed mixed{};
  mixed.stride = round_up(p.value_dim, kColumns);
  mixed.values = buffer_array<float>(memory.mixed, p.heads * kBlock * mixed.stride);
  mixed.totals = buffer_array<float>(memory.totals, p.heads * kBlock);
  mixed.weights = buffer_array<bf16>(memory.weights, kBlock * kBlock);
  std::memset(mixed.values, 0, p.heads * kBlock * mixed.stride * sizeof(float));
  std::memset(mixed.totals, 0, p.heads * kBlock * sizeof(float));
  return mixed;
}

inline void write_mixed(const IndexerPass& p, const Sequence& s, const QueryBlock& b, const Mixed& mixed) {
  for (std::int64_t h = 0; h < p.heads; ++h) {
    for (std::int64_t r = 0; r < b.rows; ++r) {
      const F total = set1(mixed.totals[h * kBlock + r]);
      const float* from = mixed.values + (h * kBlock + r) * mixed.stride;
      bf16* to = p.out + ((s.start + b.start + r) * p.heads + h) * p.value_dim;
      for (std::int64_t c = 0; c < p.value_dim; c += kTile) store_bf16(to + c, div(load(from + c), total), p.value_dim - c);
    }
  }
}

inline void sum_attention(const IndexerPass& p, const Sequence& s, const QueryBlock& b, Memory& memory) {
  const std::int64_t stride = round_up(p.key_dim, kColumns), step = p.heads * p.key_dim, token = s.start + b.start;
  auto* q = buffer_array<bf16>(memory.q, p.heads * kBlock * stride);
  for (std::int64_t h = 0; h < p.heads; ++h) {
    copy_rows(p.q + token * step + h * p.key_dim, step, b.rows, p.key_dim, q + h * kBlock * stride);
  }
  const F scale = set1(p.scale);
  Mixed mixed{};
  if (p.out != nullptr) mixed = new_mixed(p, memory);
  for (std::int64_t block = 0; block < b.blocks(); ++block) {
    for (std::int64_t h = 0; h < p.heads; ++h) {
      causal::times_rows(s.keys[h * p.kv_heads / p.heads], block, q + h * kBlock * stride, b.rows, b.products);
      for (std::int64_t r = 0; r < b.rows; ++r) {
        const F log_total = set1(p.log_total[(token + r) * p.heads + h]);
        float* to = b.attention + r * b.width + block * kBlock;
        for (std::int64_t c = 0; c < kBlock; c += kTile) {
          const F score = mul(load(b.products + r * kBlock + c), scale);
          const F weight = exp_of_negative(min(zero(), sub(score, log_total)));
          store(b.products + r * kBlock + c, weight);
          store(to + c, h == 0 ? weight : add(load(to + c), weight));
        }
      }
      if (p.out != nullptr) add_chosen(p, s, b, block, h, mixed);
    }
  }
  if (p.out != nullptr) write_mixed(p, s, b, mixed);
}

inline void score_keys(const IndexerPass& p, const Sequence& s, const QueryBlock& b) {
  for (std::int64_t block = 0; block < b.blocks(); ++block) {
    causal::times_rows(s.index_keys, block, b.index_q, b.rows * p.index_heads, b.products);
    for (std::int64_t r = 0; r < b.rows; ++r) {
      for (std::int64_t c = 0; c < kBlock; c += kTile) {
        F total = zero();
        for (std::int64_t h = 0; h < p.index_heads; ++h) {
          const F positive = max(zero(), load(b.products + (r * p.index_heads + h) * kBlock + c));
          total = fma(set1(head_weight(p, s.start + b.start + r, h)), positive, total);
        }
        // A NaN becomes infinity: the loss is NaN.
        const F finite = max(set1(-kMostFinite), min(total, set1(-kNone)));
        store(b.scores + r * b.width + block * kBlock + c, finite);
      }
    }
  }
}

// The tokens that a query attends to; index scores of later keys become -inf.
inline void choose(const IndexerPass& p, const QueryBlock& b, std::int64_t r, Memory& memory) {
  const std::int64_t count = b.count(r);
  float* scores = b.scores + r * b.width;
  float* mask = b.mask + r * b.width;
  for (std::int64_t key = count; key < b.width; ++key) scores[key] = kNone;
  for (std::int64_t key = 0; key < b.width; ++key) mask[key] = key < count && count <= p.topk;
  if (count <= p.topk) return;
  auto* chosen = memory.choice.get<std::int32_t>(0, p.topk);
  choose_tokens(scores, count, p.topk, memory.choice, chosen);
  for (std::int64_t i = 0; i < p.topk; ++i) mask[chosen[i]] = 1;
}

// KL divergence and recall of a query; its scores become the gradient of the weighted divergence.
inline void compare(const IndexerPass& p, const Sequence& s, const QueryBlock& b, std::int64_t r) {
  const std::int64_t count = b.count(r), whole = round_up(count, kTile), token = s.start + b.start + r;
  float* attention = b.attention + r * b.width;
  float* scores = b.scores + r * b.width;
  for (std::int64_t key = count; key < b.width; ++key) attention[key] = 0;
  F highest = set1(kNone), sums = zero(), totals = zero(), masses = zero();
  for (std::int64_t key = 0; key < whole; key += kTile) {
    highest = max(highest, load(scores + key));
    totals = add(totals, load(attention + key));
    masses = fma(load(attention + key), load(b.mask + r * b.width + key), masses);
  }
  const float top = largest(highest), total = sum(totals);
  for (std::int64_t key = 0; key < whole; key += kTile) sums = add(sums, exp_of_negative(sub(load(scores + key), set1(top))));
  const float log_total = top + std::log(sum(sums));
  p.recall[token] = p.topk < count ? sum(masses) / total : 1.0f;
  p.kl[token] = __builtin_nanf("");
  if (p.out != nullptr) return;
  double kl = 0;
  for (std::int64_t key = 0; key < count; ++key) {
    const float share = attention[key] / total;
    if (!(share <= 0)) kl += share * (std::log(share) - scores[key] + log_total);
  }
  p.kl[token] = static_cast<float>(kl);
  if (p.grad_q == nullptr) return;
  const F weight = set1(p.weight), inverse = set1(1 / total), base = set1(log_total);
  for (std::int64_t key = 0; key < whole; key += kTile) {
    const F share = exp_of_negative(min(zero(), sub(load(scores + key), base)));
    store(scores + key, mul(weight, sub(share, mul(load(attention + key), inverse))));
  }
  for (std::int64_t key = whole; key < b.width; ++key) scores[key] = 0;
}

// Gradients of the products of index queries with a block of keys, bf16 [rows * index_heads, 64], and of head weights.
inline void product_gradients(const IndexerPass& p, const Sequence& s, const QueryBlock& b, std::int64_t block,
                              bf16* slopes) {
  for (std::int64_t r = 0; r < b.rows; ++r) {
    const std::int64_t token = s.start + b.start + r;
    F from[kBlock / kTile];
    for (int i = 0; i < kBlock / kTile; ++i) from[i] = load(b.scores + r * b.width + block * kBlock + i * kTile);
    for (std::int64_t h = 0; h < p.index_heads; ++h) {
      const std::int64_t row = (r * p.index_heads + h) * kBlock;
      const F weight = set1(head_weight(p, token, h));
      F slope[kBlock / kTile], along = zero();
      for (int i = 0; i < kBlock / kTile; ++i) {
        const F product = load(b.products + row + i * kTile);
        slope[i] = zero_below(mul(from[i], weight), product, set1(kLeastPositive));
        along = fma(from[i], max(zero(), product), along);
      }
      store_pairs(slopes + row, pairs_in_order(slope[0], slope[1]));
      store_pairs(slopes + row + 32, pairs_in_order(slope[2], slope[3]));
      p.grad_weights[token * p.index_heads + h] += sum(along) * p.index_scale;
    }
  }
}

inline void backward(const IndexerPass& p, const Sequence& s, const QueryBlock& b, float* grad_k, Memory& memory) {
  const std::int64_t rows = b.rows * p.index_heads, stride = s.stride, token = s.start + b.start;
  const std::int64_t padded = round_up(rows, kBlock);
  auto* slopes = buffer_array<bf16>(memory.slopes, padded * kBlock);
  auto* grad_q = buffer_array<float>(memory.grad_q, rows * stride);
  auto* transposed = buffer_array<bf16>(memory.transposed, kBlock * kBlock);
  std::memset(slopes, 0, padded * kBlock * sizeof(bf16));
  std::memset(grad_q, 0, rows * stride * sizeof(float));
  std::memset(p.grad_weights + token * p.index_heads, 0, rows * sizeof(float));
  const HeadPanels queries = causal::make_panels(b.index_q, stride, rows, p.index_dim, nullptr, &memory.query_panels);
  Panel panels[2 * kBlock / kColumns];
  for (std::int64_t block = 0; block < b.blocks(); ++block) {
    causal::times_rows(s.index_keys, block, b.index_q, rows, b.products);
    product_gradients(p, s, b, block, slopes);
    causal::times_block(s.index_keys, block, slopes, rows, grad_q, stride);
    const std::int64_t keys = least(kBlock, s.length - block * kBlock);
    for (std::int64_t part = 0; part < padded / kBlock; ++part) {
      transpose_columns(view(slopes + part * kBlock * kBlock, kBlock, kBlock, kBlock), panels, transposed, kBlock);
      causal::times_block(queries, part, transposed, keys, grad_k + block * kBlock * stride, stride);
    }
  }
  causal::write_rows(grad_q, stride, rows, p.index_dim, p.grad_q + token * p.index_heads * p.index_dim, p.index_dim);
}

inline void query_block(const IndexerPass& p, const Sequence& s, std::int64_t start, float* grad_k, Memory& memory) {
  QueryBlock b{};
  b.start = start;
  b.rows = least(kBlock, s.length - start);
  b.seen = start + b.rows;
  b.width = round_up(b.seen, kBlock);
  b.attention = buffer_array<float>(memory.attention, b.rows * b.width);
  b.scores = buffer_array<float>(memory.scores, b.rows * b.width);
  b.mask = buffer_array<float>(memory.mask, b.rows * b.width);
  b.products = buffer_array<float>(memory.products, most(1, p.index_heads) * kBlock * kBlock);
  auto* index_q = buffer_array<bf16>(memory.index_q, b.rows * p.index_heads * s.stride);
  const std::int64_t first = (s.start + start) * p.index_heads;
  copy_rows(p.index_q + first * p.index_dim, p.index_dim, b.rows * p.index_heads, p.index_dim, index_q);
  b.index_q = index_q;
  score_keys(p, s, b);
  for (std::int64_t r = 0; r < b.rows; ++r) choose(p, b, r, memory);
  sum_attention(p, s, b, memory);
  for (std::int64_t r = 0; r < b.rows; ++r) compare(p, s, b, r);
  if (p.grad_q != nullptr) backward(p, s, b, grad_k, memory);
}

// Places the panels of the sequence's keys and the sums in the shared buffers, which grow if they are too small.
inline void place_keys(const IndexerPass& p, Sequence& s) {
  const std::int64_t blocks = blocks_of(s.length);
  s.keys.resize(p.kv_heads);
  s.values.resize(p.out == nullptr ? 0 : p.kv_heads);
  s.index_keys.width = p.index_dim;
  s.index_keys.length = s.length;
  const std::int64_t of_keys = 4 * num_panels(p.key_dim) * blocks, of_values = 4 * num_panels(p.value_dim) * blocks;
  const std::int64_t of_index = s.index_keys.row_panels() * blocks;
  auto* panels = buffer_array<Panel>(*p.panels, p.kv_heads * (of_keys + of_values) + 2 * of_index);
  for (HeadPanels& head : s.keys) head = {panels, nullptr, p.key_dim, s.length}, panels += of_keys;
  for (HeadPanels& head : s.values) head = {nullptr, panels, p.value_dim, s.length}, panels += of_values;
  s.index_keys.rows = panels;
  s.index_keys.transposed = panels + of_index;
  s.stride = round_up(p.index_dim, kColumns);
  if (p.grad_q != nullptr) s.grad_k = buffer_array<float>(*p.sums, kPieces * s.length * s.stride);
}

inline void pack(const IndexerPass& p, const Sequence& s, std::int64_t block) {
  const std::int64_t step = p.kv_heads * p.key_dim;
  for (std::int64_t h = 0; h < p.kv_heads; ++h) {
    causal::pack_block(s.keys[h], block, p.k + s.start * step + h * p.key_dim, step);
    if (p.out == nullptr) continue;
    const std::int64_t v_step = p.kv_heads * p.value_dim;
    causal::pack_block(s.values[h], block, p.v + s.start * v_step + h * p.value_dim, v_step);
  }
  causal::pack_block(s.index_keys, block, p.index_k + s.start * p.index_dim, p.index_dim);
}

// Adds the pieces' gradients of 64 keys.
inline void add_pieces(const IndexerPass& p, const Sequence& s, std::int64_t block) {
  const std::int64_t first = block * kBlock, keys = least(kBlock, s.length - first);
  float* to = s.grad_k + first * s.stride;
  for (std::int64_t piece = 1; piece < kPieces; ++piece) {
    const float* from = s.piece_grad_k(piece) + first * s.stride;
    for (std::int64_t i = 0; i < keys * s.stride; i += kTile) store(to + i, add(load(to + i), load(from + i)));
  }
  causal::write_rows(to, s.stride, keys, p.index_dim, p.grad_k + (s.start + first) * p.index_dim, p.index_dim);
}

inline void loss(Team& team, const IndexerPass& p) {
  const ProductSession session;
  Memory memory;
  for (std::int64_t number = 0; number < p.sequences; ++number) {
    Sequence s;
    s.start = number == 0 ? 0 : p.ends[number - 1];
    s.length = p.ends[number] - s.start;
    if (team.thread() == 0) place_keys(p, s);  // grows the buffers
    team.barrier();
    place_keys(p, s);
    const std::int64_t blocks = blocks_of(s.length);
    team.for_chunks(blocks, 1, [&](std::int64_t block, std::int64_t) { pack(p, s, block); });
    team.for_chunks(kPieces, 1, [&](std::int64_t piece, std::int64_t) {
      float* grad_k = nullptr;
      if (p.grad_q != nullptr) {
        grad_k = s.piece_grad_k(piece);
        std::memset(grad_k, 0, s.length * s.stride * sizeof(float));
      }
      for (std::int64_t block = piece; block < blocks; block += kPieces) query_block(p, s, block * kBlock, grad_k, memory);
    });
    if (p.grad_q == nullptr) continue;
    team.for_chunks(blocks, 1, [&](std::int64_t block, std::int64_t) { add_pieces(p, s, block); });
  }
}

}  // namespace lowlat::LOWLAT_ISA::indexer
