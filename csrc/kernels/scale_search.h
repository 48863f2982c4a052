// Search of int4 and int8 scales by weighted error, and GPTQ's error feedback within a block of columns: native kernels
// of int4_search, int8_search and feedback_block in lowlat/ops.
//
// A lane is a row of a tile, and all sums run over its columns in their order without fused operations, so that every
// level gives the same bits.
#pragma once

#include <limits>

#include "../quantization.h"
#include "quantize.h"

namespace lowlat::LOWLAT_ISA::quantization {

struct Range {
  F scale, minimum;
};

// 32 columns of 16 rows, the last column repeated where there are fewer, and the weights of their errors.
struct Group {
  F value[kGroup];
  float weight[kGroup];
};

inline F infinity() { return set1(std::numeric_limits<float>::infinity()); }
inline F minus_infinity() { return set1(-std::numeric_limits<float>::infinity()); }

// a where x < limit, else other (NaN included).
inline F where_below(F x, F limit, F a, F other) { return within(a, x, minus_infinity(), limit, other); }

// A tile of rows by columns: column c in out[c].
inline void transpose_tile(const float* rows, std::int64_t stride, std::int64_t columns, F* out) {
  alignas(64) float lanes[kFeedbackColumns][kTile];
  for (std::int64_t r = 0; r < kTile; ++r) {
    for (std::int64_t c = 0; c < columns; ++c) lanes[c][r] = rows[r * stride + c];
  }
  for (std::int64_t c = 0; c < columns; ++c) out[c] = load(lanes[c]);
}

inline void fill(Group& group, const F* columns, const float* weights, std::int64_t count) {
  for (std::int64_t c = 0; c < kGroup; ++c) {
    group.value[c] = columns[least(c, count - 1)];
    group.weight[c] = c < count ? weights[c] : 0.0f;
  }
}

// 16 numbers rounded to fp16, which are also stored.
inline F round_to_fp16(F numbers, fp16 (&out)[kTile]) {
  alignas(64) float wide[kTile];
  store(wide, numbers);
  for (std::int64_t r = 0; r < kTile; ++r) out[r] = to_fp16(wide[r]);
  return load_fp16(out);
}

inline F round_to_fp16(F numbers) {
  alignas(64) fp16 narrow[kTile];
  return round_to_fp16(numbers, narrow);
}

// The scale, or 1 where it is 0.
inline F divisor(F scale) {
  return within(set1(1.0f), scale, zero(), set1(std::numeric_limits<float>::denorm_min()), scale);
}

// An error to improve: where it is not finite the range overflows, and no error is below it.
inline F unless_overflown(F error) {
  return within(error, error, set1(-std::numeric_limits<float>::max()), infinity(), minus_infinity());
}

// 0, or NaN where a value is not finite.
inline F poison(const Group& group) {
  F sum = zero();
  for (const F& value : group.value) sum = add(sum, mul(value, zero()));
  return sum;
}

inline F int4_value(F value, F divided_by, F minimum) {
  return clamped(round_even(div(sub(value, minimum), divided_by)), 0, 15);
}

inline F int8_value(F value, F divided_by) { return clamped(round_even(div(value, divided_by)), -127, 127); }

inline F int4_error(const Group& group, const Range& range) {
  const F divided_by = divisor(range.scale);
  F total = zero();
  for (int c = 0; c < kGroup; ++c) {
    const F q = int4_value(group.value[c], divided_by, range.minimum);
    const F off = sub(add(mul(q, range.scale), range.minimum), group.value[c]);
    total = add(total, mul(mul(off, off), set1(group.weight[c])));
  }
  return total;
}

// Weighted least squares fit of scale * q + minimum; a scale of 0 for groups of one q. sum: of the weights. mean: of the
// values.
inline Range fit_line(const Group& group, F sum, F mean, const Range& start) {
  F q[kGroup];
  const F divided_by = divisor(start.scale);
  F total_q = zero();
  for (int c = 0; c < kGroup; ++c) {
    q[c] = int4_value(group.value[c], divided_by, start.minimum);
    total_q = add(total_q, mul(set1(group.weight[c]), q[c]));
  }
  const F mean_q = div(total_q, sum);
  F variance = zero(), covariance = zero();
  for (int c = 0; c < kGroup; ++c) {
    const F centred = sub(q[c], mean_q), weighted = mul(set1(group.weight[c]), centred);
    variance = add(variance, mul(weighted, centred));
    covariance = add(covariance, mul(weighted, group.value[c]));
  }
  const F scale = div(covariance, where_below(zero(), variance, variance, set1(1.0f)));
  return {scale, sub(mean, mul(scale, mean_q))};
}

// The range of least error among min-max and the refitted shrunk ranges that use the smallest and the largest q.
inline Range search_int4(const Group& group, const ScaleSearch& s) {
  F low = group.value[0], high = low, mean = zero();
  float weight = 0;
  for (int c = 0; c < kGroup; ++c) {
    low = min(low, group.value[c]);
    high = max(high, group.value[c]);
    mean = add(mean, mul(set1(group.weight[c]), group.value[c]));
    weight += group.weight[c];
  }
  low = add(low, zero());  // one sign of zero on every level
  const F sum = set1(weight), extent = sub(high, low);
  mean = div(mean, sum);
  Range best{round_to_fp16(div(extent, set1(15.0f))), round_to_fp16(low)};
  F least_error = unless_overflown(int4_error(group, best));
  for (const double from_low : s.shrinks) {
    for (const double from_high : s.shrinks) {
      Range range{mul(extent, set1(static_cast<float>((1 - from_low - from_high) / 15))),
                  add(low, mul(extent, set1(static_cast<float>(from_low))))};
      for (int fit = 0; fit < s.refits; ++fit) range = fit_line(group, sum, mean, range);
      range = {round_to_fp16(range.scale), round_to_fp16(range.minimum)};
      const F divided_by = divisor(range.scale);
      const F first = int4_value(low, divided_by, range.minimum), last = int4_value(high, divided_by, range.minimum);
      F error = int4_error(group, range);
      error = where_below(first, set1(0.5f), error, infinity());
      error = where_below(set1(14.5f), last, error, infinity());
      best.scale = where_below(error, least_error, range.scale, best.scale);
      best.minimum = where_below(error, least_error, range.minimum, best.minimum);
      least_error = where_below(error, least_error, error, least_error);
    }
  }
  const F bad = poison(group);
  return {add(best.scale, bad), add(best.minimum, bad)};
}

inline F int8_error(const Group& group, F scale) {
  const F divided_by = divisor(scale);
  F total = zero();
  for (int c = 0; c < kGroup; ++c) {
    const F off = sub(mul(int8_value(group.value[c], divided_by), scale), group.value[c]);
    total = add(total, mul(mul(off, off), set1(group.weight[c])));
  }
  return total;
}

// The scale of least error among max-abs and the refitted shrunk ones that use the largest q.
inline F search_int8(const Group& group, const ScaleSearch& s) {
  F most = zero();
  for (const F& value : group.value) most = max(most, max(value, sub(zero(), value)));
  const F largest = div(most, set1(127.0f));
  F best = round_to_fp16(largest);
  F least_error = unless_overflown(int8_error(group, best));
  for (const double shrink : s.shrinks) {
    F scale = mul(largest, set1(static_cast<float>(shrink)));
    for (int fit = 0; fit < s.refits; ++fit) {
      const F divided_by = divisor(scale);
      F squares = zero(), products = zero();
      for (int c = 0; c < kGroup; ++c) {
        const F q = int8_value(group.value[c], divided_by), weighted = mul(set1(group.weight[c]), q);
        squares = add(squares, mul(weighted, q));
        products = add(products, mul(weighted, group.value[c]));
      }
      scale = div(products, where_below(zero(), squares, squares, set1(1.0f)));
    }
    scale = round_to_fp16(scale);
    const F used = int8_value(mul(largest, set1(127.0f)), divisor(scale));
    const F error = where_below(set1(126.5f), used, int8_error(group, scale), infinity());
    best = where_below(error, least_error, scale, best);
    least_error = where_below(error, least_error, error, least_error);
  }
  return add(best, poison(group));
}

inline void store_numbers(F numbers, fp16* to, std::int64_t stride) {
  alignas(64) fp16 narrow[kTile];
  round_to_fp16(numbers, narrow);
  for (std::int64_t r = 0; r < kTile; ++r) to[r * stride] = narrow[r];
}

// All groups of all rows; `is_int4` selects the kind.
template <bool is_int4>
void search(const ScaleSearch& s) {
  const std::int64_t groups = (s.columns + kGroup - 1) / kGroup;
  for (std::int64_t row = 0; row < s.count; row += kTile) {
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::int64_t first = g * kGroup, count = least(kGroup, s.columns - first);
      F columns[kGroup];
      Group group;
      transpose_tile(s.rows + row * s.stride + first, s.stride, count, columns);
      fill(group, columns, s.importance + first, count);
      const std::int64_t place = row * groups + g;
      if constexpr (is_int4) {
        const Range range = search_int4(group, s);
        store_numbers(range.scale, s.scale + place, groups);
        store_numbers(range.minimum, s.minimum + place, groups);
      } else {
        store_numbers(search_int8(group, s), s.scale + place, groups);
      }
    }
  }
}

// Rows of `columns` numbers, `stride` apart, from lanes.
inline void store_columns(const F* columns, std::int64_t count, float* to, std::int64_t stride) {
  for (std::int64_t c = 0; c < count; ++c) {
    alignas(64) float lanes[kTile];
    store(lanes, columns[c]);
    for (std::int64_t r = 0; r < kTile; ++r) to[r * stride + c] = lanes[r];
  }
}

// q of a group: columns are rounded one by one, and the error of each moves the columns after it. Rows that would not
// use the smallest or largest q are rounded without feedback.
inline void round_with_feedback(const F* target, std::int64_t count, const Range& range, const float* factor,
                                std::int64_t stride, F* q) {
  const F divided_by = divisor(range.scale);
  F left[kGroup], smallest = set1(15.0f), largest = zero();
  for (std::int64_t c = 0; c < count; ++c) left[c] = target[c];
  for (std::int64_t c = 0; c < count; ++c) {
    q[c] = int4_value(left[c], divided_by, range.minimum);
    smallest = min(smallest, q[c]);
    largest = max(largest, q[c]);
    const F missed = div(sub(left[c], add(mul(q[c], range.scale), range.minimum)), set1(factor[c * stride + c]));
    for (std::int64_t j = c + 1; j < count; ++j) left[j] = sub(left[j], mul(missed, set1(factor[c * stride + j])));
  }
  for (std::int64_t c = 0; c < count; ++c) {
    const F plain = int4_value(target[c], divided_by, range.minimum);
    q[c] = where_below(smallest, set1(0.5f), q[c], plain);
    q[c] = where_below(set1(14.5f), largest, q[c], plain);
  }
}

// errors with errors U = target - dequantized, U the factor.
inline void solve_errors(const F* target, std::int64_t count, const Range& range, const float* factor,
                         std::int64_t stride, const F* q, F* errors) {
  for (std::int64_t c = 0; c < count; ++c) errors[c] = sub(target[c], add(mul(q[c], range.scale), range.minimum));
  for (std::int64_t c = 0; c < count; ++c) {
    errors[c] = div(errors[c], set1(factor[c * stride + c]));
    for (std::int64_t j = c + 1; j < count; ++j) errors[j] = sub(errors[j], mul(errors[c], set1(factor[c * stride + j])));
  }
}

// columns [first, last) -= errors times the factor's rows.
inline void subtract_errors(const F* errors, std::int64_t count, const float* factor, std::int64_t stride,
                            std::int64_t first, std::int64_t last, F* columns) {
  constexpr std::int64_t kAtOnce = 8;
  std::int64_t c = first;
  for (; c + kAtOnce <= last; c += kAtOnce) {
    F sum[kAtOnce];
    for (std::int64_t i = 0; i < kAtOnce; ++i) sum[i] = columns[c + i];
    for (std::int64_t k = 0; k < count; ++k) {
      for (std::int64_t i = 0; i < kAtOnce; ++i) sum[i] = sub(sum[i], mul(errors[k], set1(factor[k * stride + c + i])));
    }
    for (std::int64_t i = 0; i < kAtOnce; ++i) columns[c + i] = sum[i];
  }
  for (; c < last; ++c) {
    for (std::int64_t k = 0; k < count; ++k) columns[c] = sub(columns[c], mul(errors[k], set1(factor[k * stride + c])));
  }
}

// At most kFeedbackColumns columns of all rows.
inline void feedback(const ScaleSearch& s) {
  const std::int64_t groups = (s.columns + kGroup - 1) / kGroup;
  for (std::int64_t row = 0; row < s.count; row += kTile) {
    F columns[kFeedbackColumns], errors[kFeedbackColumns];
    transpose_tile(s.rows + row * s.stride, s.stride, s.columns, columns);
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::int64_t first = g * kGroup, count = least(kGroup, s.columns - first);
      const float* own = s.factor + first * s.factor_stride + first;
      Group group;
      fill(group, columns + first, s.importance + first, count);
      const Range range = search_int4(group, s);
      F q[kGroup];
      round_with_feedback(columns + first, count, range, own, s.factor_stride, q);
      solve_errors(columns + first, count, range, own, s.factor_stride, q, errors + first);
      subtract_errors(errors + first, count, s.factor + first * s.factor_stride, s.factor_stride, first + count,
                      s.columns, columns);
      for (std::int64_t c = count; c < kGroup; ++c) q[c] = zero();
      store_columns(q, kGroup, s.q + (row * groups + g) * kGroup, groups * kGroup);
      store_numbers(range.scale, s.scale + row * groups + g, groups);
      store_numbers(range.minimum, s.minimum + row * groups + g, groups);
    }
    store_columns(errors, s.columns, s.errors + row * s.columns, s.columns);
  }
}

}  // namespace lowlat::LOWLAT_ISA::quantization
