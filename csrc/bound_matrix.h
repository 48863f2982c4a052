// Python binding of weight matrices: BoundMatrix holds the tensors that own a Matrix's memory.
#pragma once

#include <optional>
#include <vector>

#include "arrays.h"
#include "matrix.h"

namespace lowlat {

struct BoundMatrix {
  Matrix matrix;
  std::vector<Array> owners;
};

// Adds class Matrix and its factory functions to the module.
void bind_matrix(nb::module_& module);

}  // namespace lowlat
