// The training operations as Python sees them.
#pragma once

#include <nanobind/nanobind.h>

namespace lowlat {

void bind_training(nanobind::module_& module);

}  // namespace lowlat
