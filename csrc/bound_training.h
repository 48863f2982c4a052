// Python binding of the training kernels (training.h).
#pragma once

#include <nanobind/nanobind.h>

namespace lowlat {

void bind_training(nanobind::module_& module);

}  // namespace lowlat
