// Python binding of a whole decoder: builds the model from its parts and runs a step.
#pragma once

#include "arrays.h"

namespace lowlat {

// Adds the classes Norm, Projection, Mlp, Router, Moe, Attention, Layer, Join and Model to the module.
void bind_model(nb::module_& module);

}  // namespace lowlat
