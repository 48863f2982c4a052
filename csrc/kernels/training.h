// Row-wise training kernels: RMSNorm, SwiGLU, RoPE, cross entropy, expert combine, forward and backward. fp32 inside,
// rounded once.
#pragma once

#include <cmath>
#include <type_traits>

#include "../training.h"
#include "../workspace.h"
#include "common.h"
#include "rowwise.h"

namespace lowlat::LOWLAT_ISA::training {

inline F get(const bf16* p, std::int64_t left) { return load_bf16(p, left); }
inline F get(const float* p, std::int64_t left) { return load(p, left); }
inline void put(bf16* p, F a, std::int64_t left) { store_bf16(p, a, left); }
inline void put(float* p, F a, std::int64_t left) {
  if (left >= 16) return store(p, a);
  alignas(64) float edge[16];
  store(edge, a);
  std::memcpy(p, edge, left * sizeof(float));
}
inline float one(bf16 x) { return bf16_to_float(x); }
inline float one(float x) { return x; }
inline void set(bf16& to, float x) { to = float_to_bf16(x); }
inline void set(float& to, float x) { to = x; }

template <class T>
T* row(const Values& values, std::int64_t index, std::int64_t stride) {
  return static_cast<T*>(values.data) + index * stride;
}

// body(i, 16) for all whole vectors of a row and body(i, left) for the rest, so that the full width is a compile-time
// constant.
template <class Body>
inline void for_lanes(std::int64_t size, Body&& body) {
  const std::int64_t whole = size / 16 * 16;
  for (std::int64_t i = 0; i < whole; i += 16) body(i, std::integral_constant<std::int64_t, 16>{});
  if (whole < size) body(whole, size - whole);
}

// A parallel loop over chunks of rows, instantiated for either value type.
constexpr std::int64_t kRowChunk = 16;

template <class T>
void norm_forward(Team& team, const NormPass& p) {
  team.for_chunks(p.rows, kRowChunk, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t r = first; r < last; ++r) {
      const T* x = row<T>(p.x, r, p.size);
      T* out = row<T>(p.out, r, p.size);
      F squares = zero();
      for_lanes(p.size, [&](std::int64_t i, auto left) {
        const F v = get(x + i, left);
        squares = fma(v, v, squares);
      });
      p.inverse[r] = 1.0f / std::sqrt(sum(squares) / static_cast<float>(p.size) + p.eps);
      const F scale = set1(p.inverse[r]);
      for_lanes(p.size, [&](std::int64_t i, auto left) {
        put(out + i, mul(mul(get(x + i, left), scale), load(p.weight + i, left)), left);
      });
    }
  });
}

// With y = x r w and r = 1 / rms: dx = r w dy - x r^3 sum(w dy x) / size, dw = sum over rows of dy x r.
template <class T>
void norm_backward_row(const NormPass& p, std::int64_t r, float* grad_weight) {
  const T* x = row<T>(p.x, r, p.size);
  const T* grad = row<T>(p.grad, r, p.size);
  T* out = row<T>(p.out, r, p.size);
  const F inverse = set1(p.inverse[r]);
  F along = zero();
  for_lanes(p.size, [&](std::int64_t i, auto left) {
    const F dy_x = mul(get(grad + i, left), get(x + i, left));
    along = fma(dy_x, load(p.weight + i, left), along);
    put(grad_weight + i, fma(dy_x, inverse, load(grad_weight + i, left)), left);
  });
  const float r1 = p.inverse[r];
  const F back = set1(-r1 * r1 * r1 * sum(along) / static_cast<float>(p.size));
  for_lanes(p.size, [&](std::int64_t i, auto left) {
    const F straight = mul(mul(get(grad + i, left), load(p.weight + i, left)), inverse);
    put(out + i, fma(get(x + i, left), back, straight), left);
  });
}

template <class T>
void norm_backward(Team& team, const NormPass& p) {
  const std::int64_t pieces = (p.rows + kNormPiece - 1) / kNormPiece;
  team.for_chunks(pieces, 1, [&](std::int64_t piece, std::int64_t) {
    float* part = p.partial + piece * p.size;
    std::memset(part, 0, p.size * sizeof(float));
    const std::int64_t last = least(p.rows, (piece + 1) * kNormPiece);
    for (std::int64_t r = piece * kNormPiece; r < last; ++r) norm_backward_row<T>(p, r, part);
  });
  team.for_chunks((p.size + 15) / 16, 4, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t block = first; block < last; ++block) {
      const std::int64_t i = block * 16, left = p.size - i;
      F total = zero();
      for (std::int64_t piece = 0; piece < pieces; ++piece) total = add(total, load(p.partial + piece * p.size + i, left));
      put(p.grad_weight + i, total, left);
    }
  });
}

inline F sigmoid(F x) {
  const F one = set1(1.0f), minus = sub(zero(), x);
  const F e = exp_or_zero(min(x, minus));
  return div(max(e, zero_below(one, x, zero())), add(one, e));
}

template <class T>
void gated_forward(Team& team, const GatedPass& p) {
  team.for_chunks(p.rows, kRowChunk, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t r = first; r < last; ++r) {
      const T* gate = row<T>(p.gate, r, p.stride);
      const T* up = row<T>(p.up, r, p.stride);
      T* inner = row<T>(p.inner, r, p.size);
      for_lanes(p.size, [&](std::int64_t i, auto left) {
        put(inner + i, swiglu(get(gate + i, left), get(up + i, left)), left);
      });
    }
  });
}

template <class T>
void gated_backward_row(const GatedPass& p, std::int64_t r) {
  const T* gate = row<T>(p.gate, r, p.stride);
  const T* up = row<T>(p.up, r, p.stride);
  const T* grad = row<T>(p.grad, r, p.size);
  T* inner = p.inner.data == nullptr ? nullptr : row<T>(p.inner, r, p.size);
  T* grad_gate = row<T>(p.grad_gate, r, p.stride);
  T* grad_up = row<T>(p.grad_up, r, p.stride);
  const F factor = set1(p.factors == nullptr ? 1.0f : p.factors[r]), unit = set1(1.0f);
  F along = zero();
  for_lanes(p.size, [&](std::int64_t i, auto left) {
    const F g = get(gate + i, left), u = get(up + i, left), d = get(grad + i, left);
    const F s = sigmoid(g), silu = mul(g, s);
    if (inner != nullptr) {
      put(inner + i, mul(silu, u), left);
      along = fma(d, get(inner + i, left), along);
    }
    const F scaled = mul(d, factor);
    put(grad_up + i, mul(scaled, silu), left);
    put(grad_gate + i, mul(mul(scaled, u), fma(silu, sub(unit, s), s)), left);
  });
  if (p.grad_factors != nullptr) p.grad_factors[r] = sum(along);
}

template <class T>
void gated_backward(Team& team, const GatedPass& p) {
  team.for_chunks(p.rows, kRowChunk, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t r = first; r < last; ++r) gated_backward_row<T>(p, r);
  });
}

template <class T>
float largest_of(const T* values, std::int64_t size) {
  const std::int64_t whole = size / 16 * 16;
  float top = one(values[0]);
  F tops = set1(top);
  for (std::int64_t i = 0; i < whole; i += 16) tops = max(tops, get(values + i, 16));
  top = largest(tops);
  for (std::int64_t i = whole; i < size; ++i) top = std::fmax(top, one(values[i]));
  return top;
}

template <class T>
void entropy_row(const EntropyPass& p, std::int64_t r, float* weights) {
  T* logits = row<T>(p.logits, r, p.size);
  if (!p.counted[r]) {
    std::memset(logits, 0, p.size * sizeof(T));
    p.nll[r] = p.z[r] = 0;
    return;
  }
  const std::int64_t target = p.targets[r];
  const float chosen = one(logits[target]);
  const float top = largest_of(logits, p.size);
  const F highest = set1(top);
  F totals = zero();
  for_lanes(p.size, [&](std::int64_t i, auto left) {
    F e = exp_of_negative(sub(get(logits + i, left), highest));
    put(weights + i, e, left);
    totals = add(totals, left < 16 ? load(weights + i, left) : e);
  });
  const float total = sum(totals), denominator = top + std::log(total);
  p.nll[r] = denominator - chosen;
  p.z[r] = denominator * denominator;
  const float slope = 1.0f + 2.0f * p.z_weight * denominator;
  const F share = set1(slope / total);
  for_lanes(p.size, [&](std::int64_t i, auto left) {
    put(logits + i, mul(load(weights + i, left), share), left);
  });
  set(logits[target], weights[target] * (slope / total) - 1.0f);
}

template <class T>
void entropy(Team& team, const EntropyPass& p) {
  Buffer buffer_array;
  auto* weights = static_cast<float*>(buffer_array.reserve(static_cast<std::size_t>(p.size) * sizeof(float)));
  team.for_chunks(p.rows, 4, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t r = first; r < last; ++r) entropy_row<T>(p, r, weights);
  });
}

// The products and their sum are rounded one by one, as in PyTorch: same bits.
template <class T>
void rotate_head(const RotationPass& p, const T* x, const float* cos, const float* sin, T* out) {
  const std::int64_t half = p.dim / 2;
  const float sign = p.is_inverse ? -1.0f : 1.0f;
  if (p.interleave) {
    for (std::int64_t i = 0; i < half; ++i) {
      const float real = one(x[2 * i]), imaginary = one(x[2 * i + 1]), turn = sign * sin[i];
      set(out[2 * i], real * cos[i] - imaginary * turn);
      set(out[2 * i + 1], real * turn + imaginary * cos[i]);
    }
    return;
  }
  for_lanes(half, [&](std::int64_t i, auto left) {
    const F real = get(x + i, left), imaginary = get(x + half + i, left);
    const F c = load(cos + i, left), turn = mul(set1(sign), load(sin + i, left));
    put(out + i, sub(mul(real, c), mul(imaginary, turn)), left);
    put(out + half + i, add(mul(real, turn), mul(imaginary, c)), left);
  });
}

template <class T>
void rotation(Team& team, const RotationPass& p) {
  team.for_chunks(p.tokens, kRowChunk, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t t = first; t < last; ++t) {
      for (std::int64_t h = 0; h < p.heads; ++h) {
        const T* x = row<T>(p.x, 1, t * p.token_step + h * p.head_step);
        T* out = row<T>(p.out, t * p.heads + h, p.dim);
        rotate_head(p, x, p.cos + t * p.table_step, p.sin + t * p.table_step, out);
      }
    }
  });
}

template <class T>
void combine(Team& team, const CombinePass& p) {
  team.for_chunks(p.tokens, kRowChunk, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t t = first; t < last; ++t) {
      const std::int64_t* places = p.places + t * p.chosen;
      T* out = row<T>(p.out, t, p.size);
      for (std::int64_t i = 0; i < p.size; i += 16) {
        const std::int64_t left = p.size - i;
        F total = zero();
        for (std::int64_t c = 0; c < p.chosen; ++c) {
          const F factor = set1(p.factors == nullptr ? 1.0f : p.factors[places[c]]);
          total = fma(get(row<T>(p.rows, places[c], p.size) + i, left), factor, total);
        }
        put(out + i, total, left);
      }
    }
  });
}

// The instance for the value type of a call.
inline void norm_forward(Team& t, const NormPass& p) { p.x.is_bf16 ? norm_forward<bf16>(t, p) : norm_forward<float>(t, p); }
inline void norm_backward(Team& t, const NormPass& p) { p.x.is_bf16 ? norm_backward<bf16>(t, p) : norm_backward<float>(t, p); }
inline void gated_forward(Team& t, const GatedPass& p) { p.gate.is_bf16 ? gated_forward<bf16>(t, p) : gated_forward<float>(t, p); }
inline void gated_backward(Team& t, const GatedPass& p) { p.gate.is_bf16 ? gated_backward<bf16>(t, p) : gated_backward<float>(t, p); }
inline void entropy(Team& t, const EntropyPass& p) { p.logits.is_bf16 ? entropy<bf16>(t, p) : entropy<float>(t, p); }
inline void rotation(Team& t, const RotationPass& p) { p.x.is_bf16 ? rotation<bf16>(t, p) : rotation<float>(t, p); }
inline void combine(Team& t, const CombinePass& p) { p.rows.is_bf16 ? combine<bf16>(t, p) : combine<float>(t, p); }

}  // namespace lowlat::LOWLAT_ISA::training
