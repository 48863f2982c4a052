// Models larger than memory: asking the system for weights before they are used.
#pragma once

#include "model.h"

namespace lowlat {

// Starts reading the projections of a layer's attention, norms apart, and its dense or shared MLP. Does not wait.
void read_ahead(const Layer& layer);

// The same for one expert.
void read_ahead(const Mlp& mlp);

}  // namespace lowlat
