// A model as Python puts it together, with the tensors that own its memory.
#pragma once

#include "arrays.h"

namespace lowlat {

// Adds the classes Norm, Projection, Mlp, Router, Moe, Attention, Layer, Join and Model to the module.
void bind_model(nb::module_& module);

}  // namespace lowlat
