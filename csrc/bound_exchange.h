// Exchange of a divided model by a Python function.
#pragma once

#include <cstddef>
#include <cstdint>

#include "arrays.h"
#include "model.h"

namespace lowlat {

// An exchange by a Python function (group, address of own, bytes, address of all).
class CalledExchange final : public Exchange {
 public:
  explicit CalledExchange(const nb::callable& function) : function_(function) {}
  void gather(DivisionGroup group, const void* own, std::size_t bytes, void* all) override {
    const nb::gil_scoped_acquire acquired;
    function_(static_cast<int>(group), reinterpret_cast<std::uintptr_t>(own), bytes,
              reinterpret_cast<std::uintptr_t>(all));
  }

 private:
  const nb::callable& function_;
};

}  // namespace lowlat
