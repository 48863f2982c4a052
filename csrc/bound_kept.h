// What a step keeps for a backward pass: residual stream and routing, as tensors that Python gives.
#pragma once

#include <optional>

#include "bound_parts.h"
#include "model.h"

namespace lowlat {

// Sets the outputs of `step`, whose tokens are known. Experts and gates come together.
inline void read_kept(Step& step, const Model& model, const std::optional<Array>& residuals,
                      const std::optional<Array>& experts, const std::optional<Array>& gates) {
  const auto layers = static_cast<std::int64_t>(model.layers.size());
  if (residuals) {
    step.residuals = elements<bf16>(*residuals, "residuals", Type::bf16, {2 * layers + 1, step.tokens, model.hidden});
  }
  require(experts.has_value() == gates.has_value(), "experts and gates are kept together");
  if (!experts) return;
  std::int64_t chosen = 0;
  for (const Layer& layer : model.layers) {
    if (!layer.moe) continue;
    require(chosen == 0 || layer.moe->router.chosen == chosen, "the layers choose different numbers of experts");
    chosen = layer.moe->router.chosen;
  }
  step.experts = elements<std::int32_t>(*experts, "experts", Type::int32, {layers, step.tokens, chosen});
  step.gates = elements<float>(*gates, "gates", Type::fp32, {layers, step.tokens, chosen});
}

}  // namespace lowlat
