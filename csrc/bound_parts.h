// Python binding of norms and projections with their LoRA updates: a part of a model and the tensors that own its
// memory.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "bound_matrix.h"
#include "model.h"

namespace lowlat {

// A part of a model with the tensors that own its memory.
template <class T>
struct Bound {
  T part;
  std::vector<Array> owners;

  template <class Other>
  const Other& keep(const Bound<Other>& other) {
    owners.insert(owners.end(), other.owners.begin(), other.owners.end());
    return other.part;
  }
  const Matrix& keep(const BoundMatrix& other) {
    owners.insert(owners.end(), other.owners.begin(), other.owners.end());
    return other.matrix;
  }
  template <class Other>
  std::optional<Other> keep(const std::optional<Bound<Other>>& other) {
    if (!other) return std::nullopt;
    return keep(*other);
  }
};

using BoundNorm = Bound<Norm>;
using BoundLowRank = Bound<LowRank>;
using BoundProjection = Bound<Projection>;
using BoundMlp = Bound<Mlp>;
using BoundRouter = Bound<Router>;
using BoundMoe = Bound<Moe>;
using BoundIndexer = Bound<Indexer>;
using BoundAttention = Bound<Attention>;
// The experts can be replaced.
struct BoundLayer : Bound<Layer> {
  std::vector<Array> expert_owners;
};
using BoundMtpInput = Bound<MtpInput>;

inline void require_shape(const Matrix& m, std::int64_t rows, std::int64_t columns, const char* name) {
  if (m.rows == rows && m.columns == columns) return;
  throw std::invalid_argument(std::string(name) + " is [" + std::to_string(m.rows) + ", " + std::to_string(m.columns) +
                              "], not [" + std::to_string(rows) + ", " + std::to_string(columns) + "]");
}

inline BoundNorm make_norm(const Array& weight, float eps) {
  BoundNorm bound;
  bound.part.weight = elements<float>(weight, "weight", Type::fp32, {kAnySize});
  bound.part.size = size(weight, 0);
  bound.part.eps = eps;
  bound.owners.push_back(weight);
  return bound;
}

// The update of a projection [rows, columns] by an adapter: a [rank, columns padded to a multiple of 32] and b, B
// transposed, [rank, at least rows + 32].
inline BoundLowRank make_low_rank(const Array& a, const Array& b) {
  BoundLowRank bound;
  LowRank& update = bound.part;
  update.rank = size(a, 0);
  update.a = elements<bf16>(a, "a", Type::bf16, {update.rank, kAnySize});
  update.b = elements<bf16>(b, "b", Type::bf16, {update.rank, kAnySize});
  update.a_stride = size(a, 1);
  update.b_stride = size(b, 1);
  require(update.rank > 0 && update.a_stride % kGroup == 0, "an update has no rank, or columns of a that are no multiple of 32");
  bound.owners = {a, b};
  return bound;
}

// The updates of a projection [rows, columns] by adapter; an adapter without one has rank 0.
template <class Owner>
std::vector<LowRank> keep_updates(Owner& owner, const std::vector<std::optional<BoundLowRank>>& updates, std::int64_t rows,
                                  std::int64_t columns) {
  std::vector<LowRank> kept;
  for (const std::optional<BoundLowRank>& update : updates) {
    kept.push_back(owner.keep(update).value_or(LowRank{}));
    const LowRank& own = kept.back();
    require(own.rank == 0 || (own.b_stride >= rows + kGroup && own.a_stride >= columns && own.a_stride < columns + kGroup),
            "an update does not fit its projection");
  }
  return kept;
}

inline BoundProjection make_projection(const BoundMatrix& weight, const std::optional<Array>& bias,
                                       const std::vector<std::optional<BoundLowRank>>& updates) {
  BoundProjection bound;
  bound.part.weight = bound.keep(weight);
  if (bias) {
    bound.part.bias = elements<float>(*bias, "bias", Type::fp32, {weight.matrix.rows});
    bound.owners.push_back(*bias);
  }
  bound.part.updates = keep_updates(bound, updates, weight.matrix.rows, weight.matrix.columns);
  return bound;
}

}  // namespace lowlat
