// Layers divided among processes: inputs of linear layers and outputs of experts are gathered (all-gather), and no
// partial sums are added, so that every output keeps its chain of operations.
#pragma once

#include "phases.h"

namespace lowlat::LOWLAT_ISA {

// Memory for what this process sends in an exchange, `count` elements; the other threads wait.
template <class T>
inline T* begin_exchange(const Pass& pass, std::int64_t count) {
  pass.once([&] { pass.work.sent.reserve(static_cast<std::size_t>(count) * sizeof(T)); });
  return static_cast<T*>(pass.work.sent.reserve(0));
}

// Sends `count` elements of begin_exchange(); returns those of all `size` processes of the group, rank after rank.
template <class T>
inline const T* exchange(const Pass& pass, DivisionGroup group, std::int64_t size, std::int64_t count) {
  Workspace& work = pass.work;
  pass.once([&] {
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
    pass.step.exchange->gather(group, work.sent.reserve(0), bytes, work.received.reserve(size * bytes));
  });
  return static_cast<const T*>(work.received.reserve(0));
}

// Sends this process's columns [rows, width] of begin_exchange(); writes those of all processes to `to`, rows `stride`
// apart.
template <class T>
inline void exchange_columns(const Pass& pass, std::int64_t rows, std::int64_t width, T* to, std::int64_t stride) {
  const std::int64_t size = pass.model.division.tensor;
  const T* all = exchange<T>(pass, DivisionGroup::tensor, size, rows * width);
  pass.each(rows, [&](std::int64_t row) {
    for (std::int64_t rank = 0; rank < size; ++rank) {
      std::memcpy(to + row * stride + rank * width, all + (rank * rows + row) * width, width * sizeof(T));
    }
  });
}

// Completes rows of which this process has computed the first `width` columns, which are its part, in place or into `to`.
inline void gather_columns(const Pass& pass, const Activations& from, std::int64_t width, const Activations& to) {
  bf16* own = begin_exchange<bf16>(pass, from.rows * width);
  pass.each(from.rows, [&](std::int64_t row) {
    std::memcpy(own + row * width, from.values + row * from.stride, width * sizeof(bf16));
  });
  exchange_columns(pass, from.rows, width, to.values, to.stride);
  pass.each(from.rows, [&](std::int64_t row) { pad_row(to.values + row * to.stride, pass.model.division.tensor * width); });
}

// x += residual_scale * (y W^T + b), where this process has a part of the heads of y and of the rows of W.
inline void multiply_divided_into_residual(const Pass& pass, const Projection& p, std::int64_t width) {
  Workspace& work = pass.work;
  gather_columns(pass, work.attended, width, work.all_attended);
  const std::int64_t tokens = pass.step.tokens, hidden = pass.model.hidden;
  bf16* own = begin_exchange<bf16>(pass, tokens * p.weight.rows);
  multiply_all(pass, {{&p, &work.all_attended, own, p.weight.rows}});
  exchange_columns(pass, tokens, p.weight.rows, work.added, hidden);
  const F scale = set1(pass.model.residual_scale);
  pass.each(tokens, [&](std::int64_t t) {
    bf16* x = work.x + t * work.hidden.stride;
    for (std::int64_t i = 0; i < hidden; i += kTile) {
      const std::int64_t left = hidden - i;
      const F y = load_bf16(work.added + t * hidden + i, left);
      store_bf16(x + i, add(load_bf16(x + i, left), rounded(mul(y, scale))), left);
    }
  });
}

}  // namespace lowlat::LOWLAT_ISA
