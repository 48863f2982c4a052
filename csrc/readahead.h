// Weight prefetch for models larger than memory: madvise(MADV_WILLNEED) on memory-mapped weights before their use.
#pragma once

#include "model.h"

namespace lowlat {

// Starts reading the projections of a layer's attention (not its norms) and its dense or shared MLP. Does not wait.
void read_ahead(const Layer& layer);

// Starts reading one expert.
void read_ahead(const Mlp& mlp);

}  // namespace lowlat
