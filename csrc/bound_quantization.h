// Python bindings of the search for scales.
#pragma once

#include <nanobind/nanobind.h>

namespace lowlat {

void bind_quantization(nanobind::module_& module);

}  // namespace lowlat
