// Python binding of MLPs, routers and mixtures of experts: parts of a layer.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "bound_parts.h"

namespace lowlat {

inline BoundMlp make_mlp(const BoundProjection& gate, const BoundProjection& up, const BoundProjection& down) {
  BoundMlp bound;
  bound.part = {bound.keep(gate), bound.keep(up), bound.keep(down)};
  const Mlp& mlp = bound.part;
  require_shape(mlp.up.weight, mlp.gate.weight.rows, mlp.gate.weight.columns, "up");
  require(mlp.down.weight.rows > 0 && mlp.gate.weight.rows > 0, "an MLP has no rows");
  require(!mlp.gate.bias && !mlp.up.bias && !mlp.down.bias, "an MLP has a bias");
  return bound;
}

inline BoundRouter make_router(const BoundMatrix& weight, const std::optional<Array>& bias, std::int64_t chosen,
                        std::int64_t groups, std::int64_t kept_groups, std::int64_t best_in_group, bool is_sigmoid,
                        bool normalizes, float scaling) {
  BoundRouter bound;
  Router& router = bound.part;
  router.weight = bound.keep(weight);
  router.experts = router.weight.rows;
  if (bias) {
    router.bias = elements<float>(*bias, "bias", Type::fp32, {router.experts});
    bound.owners.push_back(*bias);
  }
  router.chosen = chosen;
  router.groups = groups;
  router.kept_groups = kept_groups;
  router.best_in_group = best_in_group;
  router.is_sigmoid = is_sigmoid;
  router.normalizes = normalizes;
  router.scaling = scaling;
  require(groups > 0 && router.experts % groups == 0 && kept_groups > 0 && kept_groups <= groups, "groups do not fit");
  require(chosen > 0 && chosen <= router.experts / groups * kept_groups, "more experts are chosen than there are");
  return bound;
}

inline BoundMoe make_moe(const BoundRouter& router, const std::vector<BoundMlp>& experts, std::int64_t first) {
  BoundMoe bound;
  bound.part.router = bound.keep(router);
  bound.part.first = first;
  for (const BoundMlp& expert : experts) bound.part.experts.push_back(bound.keep(expert));
  const auto own = static_cast<std::int64_t>(experts.size());
  require(own > 0 && router.part.experts % own == 0 && first >= 0 && first % own == 0 && first < router.part.experts,
          "the router has another number of experts");
  return bound;
}

}  // namespace lowlat
