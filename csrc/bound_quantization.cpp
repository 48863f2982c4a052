#include "bound_quantization.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "arrays.h"
#include "dispatch.h"

namespace lowlat {

namespace {

using namespace nb::literals;

// The rows and the numbers of their groups, as all three functions have them.
ScaleSearch scale_search(const Array& rows, const Array& importance, const std::vector<double>& shrinks, int refits,
                         const Array& scale) {
  ScaleSearch search;
  search.count = size(rows, 0);
  search.columns = size(rows, 1);
  check(rows, "rows", Type::fp32, {search.count, search.columns});
  if (!is_contiguous(rows, 1)) throw std::invalid_argument("rows has rows that are not contiguous");
  if (search.count % kTile != 0) throw std::invalid_argument("rows are not whole tiles of 16");
  search.rows = static_cast<const float*>(rows.data());
  search.stride = search.count > 1 ? rows.stride(0) : search.columns;
  search.importance = elements<float>(importance, "importance", Type::fp32, {search.columns});
  const std::int64_t groups = (search.columns + kGroup - 1) / kGroup;
  search.scale = elements<std::uint16_t>(scale, "scale", Type::fp16, {search.count, groups});
  search.shrinks = shrinks;
  search.refits = refits;
  return search;
}

void run(void (*kernel)(const ScaleSearch&), const ScaleSearch& search) {
  const nb::gil_scoped_release released;
  if (search.columns > 0) kernel(search);
}

std::uint16_t* minima(const Array& minimum, const ScaleSearch& search) {
  return elements<std::uint16_t>(minimum, "minimum", Type::fp16,
                                 {search.count, (search.columns + kGroup - 1) / kGroup});
}

void search_int4(const Array& rows, const Array& importance, const std::vector<double>& shrinks, int refits,
                 const Array& scale, const Array& minimum, const std::string& level) {
  ScaleSearch search = scale_search(rows, importance, shrinks, refits, scale);
  search.minimum = minima(minimum, search);
  run(ops(level).search_int4, search);
}

void search_int8(const Array& rows, const Array& importance, const std::vector<double>& shrinks, int refits,
                 const Array& scale, const std::string& level) {
  run(ops(level).search_int8, scale_search(rows, importance, shrinks, refits, scale));
}

void feedback_int4(const Array& rows, const Array& importance, const std::vector<double>& shrinks, int refits,
                   const Array& factor, const Array& scale, const Array& minimum, const Array& q, const Array& errors,
                   const std::string& level) {
  ScaleSearch search = scale_search(rows, importance, shrinks, refits, scale);
  if (search.columns > kFeedbackColumns) throw std::invalid_argument("rows has too many columns for one block");
  search.minimum = minima(minimum, search);
  check(factor, "factor", Type::fp32, {search.columns, search.columns});
  if (!is_contiguous(factor, 1)) throw std::invalid_argument("factor has rows that are not contiguous");
  search.factor = static_cast<const float*>(factor.data());
  search.factor_stride = search.columns > 1 ? factor.stride(0) : 1;
  search.q = elements<float>(q, "q", Type::fp32, {search.count, (search.columns + kGroup - 1) / kGroup, kGroup});
  search.errors = elements<float>(errors, "errors", Type::fp32, {search.count, search.columns});
  run(ops(level).feedback_int4, search);
}

}  // namespace

void bind_quantization(nb::module_& module) {
  module.def("search_int4", search_int4, "rows"_a, "importance"_a, "shrinks"_a, "refits"_a, "scale"_a, "minimum"_a,
             "level"_a = "");
  module.def("search_int8", search_int8, "rows"_a, "importance"_a, "shrinks"_a, "refits"_a, "scale"_a, "level"_a = "");
  module.def("feedback_int4", feedback_int4, "rows"_a, "importance"_a, "shrinks"_a, "refits"_a, "factor"_a, "scale"_a,
             "minimum"_a, "q"_a, "errors"_a, "level"_a = "");
}

}  // namespace lowlat
