// Row-wise operations: RMSNorm, RoPE, SwiGLU, int8 quantization of one row. fp32 inside, rounded once.
#pragma once

#include <cmath>

#include "../model.h"
#include "common.h"

namespace lowlat::LOWLAT_ISA {

// RMSNorm: out = x / sqrt(mean(x^2) + eps) * weight. May work in place.
inline void rms_norm(const Norm& norm, const bf16* x, bf16* out) {
  F squares = zero();
  for (std::int64_t i = 0; i < norm.size; i += 16) {
    const F v = load_bf16(x + i, norm.size - i);
    squares = fma(v, v, squares);
  }
  const F scale = set1(1.0f / std::sqrt(sum(squares) / static_cast<float>(norm.size) + norm.eps));
  for (std::int64_t i = 0; i < norm.size; i += 16) {
    const std::int64_t left = norm.size - i;
    store_bf16(out + i, mul(mul(load_bf16(x + i, left), scale), load(norm.weight + i, left)), left);
  }
}

// LayerNorm: out = (x - mean) / sqrt(variance + eps) * weight + bias. May work in place.
inline void layer_norm(const Norm& norm, const float* bias, const bf16* x, bf16* out) {
  const auto size = static_cast<float>(norm.size);
  F total = zero(), squares = zero();
  for (std::int64_t i = 0; i < norm.size; i += 16) total = add(total, load_bf16(x + i, norm.size - i));
  const F mean = set1(sum(total) / size);
  for (std::int64_t i = 0; i < norm.size; i += 16) {
    const std::int64_t left = norm.size - i;
    const F lane = add(lane_numbers(), set1(static_cast<float>(i)));
    const F v = within(sub(load_bf16(x + i, left), mean), lane, zero(), set1(size), zero());
    squares = fma(v, v, squares);
  }
  const F scale = set1(1.0f / std::sqrt(sum(squares) / size + norm.eps));
  for (std::int64_t i = 0; i < norm.size; i += 16) {
    const std::int64_t left = norm.size - i;
    const F v = mul(sub(load_bf16(x + i, left), mean), scale);
    store_bf16(out + i, fma(v, load(norm.weight + i, left), load(bias + i, left)), left);
  }
}

// out = x * factor. May work in place.
inline void scale_row(const bf16* x, float factor, std::int64_t size, bf16* out) {
  const F scale = set1(factor);
  for (std::int64_t i = 0; i < size; i += 16) store_bf16(out + i, mul(load_bf16(x + i, size - i), scale), size - i);
}

// RoPE of one head in place: pairs (2i, 2i + 1) if interleave, else (i, i + dim / 2).
inline void rotate(bf16* x, std::int64_t dim, const float* cos, const float* sin, bool interleave) {
  const std::int64_t half = dim / 2, step = interleave ? 2 : 1, far = interleave ? 1 : half;
  for (std::int64_t i = 0; i < half; ++i) {
    bf16* a = x + step * i;
    bf16* b = a + far;
    const float real = bf16_to_float(*a), imaginary = bf16_to_float(*b);
    *a = float_to_bf16(real * cos[i] - imaginary * sin[i]);
    *b = float_to_bf16(real * sin[i] + imaginary * cos[i]);
  }
}

// Largest magnitude, NaN if any number is NaN: without the sign bit, NaN's bits exceed those of any number.
inline float largest_magnitude(const bf16* x, std::int64_t count) {
  bf16 top = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const bf16 magnitude = x[i] & 0x7fff;
    top = magnitude > top ? magnitude : top;
  }
  return bf16_to_float(top);
}

// The scale of channels in int8.
inline float int8_scale(const bf16* x, std::int64_t count) { return largest_magnitude(x, count) / 127.0f; }

// Quantizes channels to int8 by their scale. If it is infinite or NaN they are zeros, which dequantize to NaN.
inline void round_to_int8(const bf16* x, std::int64_t count, float scale, std::int8_t* out) {
  if (!std::isfinite(scale)) {
    std::memset(out, 0, count);
    return;
  }
  const F divisor = set1(scale == 0.0f ? 1.0f : scale);
  for (std::int64_t i = 0; i < count; i += 16) {
    store_int8(out + i, round_even(div(load_bf16(x + i, count - i), divisor)), count - i);
  }
}

// Quantizes the channels of one scale group and returns the scale.
inline float round_to_int8(const bf16* x, std::int64_t count, std::int8_t* out) {
  const float scale = int8_scale(x, count);
  round_to_int8(x, count, scale, out);
  return scale;
}

// silu(gate) * up for 16 lanes. The sigmoid from e^-|gate| is exact at both ends: 1 / (1 + e), or e / (1 + e) below
// 0.
inline F swiglu(F gate, F up) {
  const F one = set1(1.0f), minus = sub(zero(), gate);
  const F e = exp_or_zero(min(gate, minus));
  const F sigmoid = div(max(e, zero_below(one, gate, zero())), add(one, e));
  return mul(mul(gate, sigmoid), up);
}

}  // namespace lowlat::LOWLAT_ISA
