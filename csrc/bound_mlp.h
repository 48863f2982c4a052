// Python binding of MLPs, routers and mixtures of experts: parts of a layer.
#pragma once

#include <algorithm>
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

// `places` has the expert of every place of all processes, equally many each.
inline BoundMoe make_moe(const BoundRouter& router, const std::vector<BoundMlp>& experts,
                         const std::vector<std::int32_t>& places) {
  BoundMoe bound;
  bound.part.router = bound.keep(router);
  bound.part.places = places;
  for (const BoundMlp& expert : experts) bound.part.experts.push_back(bound.keep(expert));
  require(!experts.empty() && places.size() % experts.size() == 0, "the processes have different numbers of experts");
  std::vector<bool> has_place(router.part.experts);
  for (std::size_t place = 0; place < places.size(); ++place) {
    const std::int32_t expert = places[place];
    require(expert >= 0 && expert < router.part.experts, "the router has another number of experts");
    require(place % experts.size() == 0 || places[place - 1] <= expert, "a process's experts do not ascend");
    has_place[expert] = true;
  }
  require(std::find(has_place.begin(), has_place.end(), false) == has_place.end(), "an expert has no place");
  return bound;
}

}  // namespace lowlat
