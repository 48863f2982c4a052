// Zero-copy tensors from Python (DLPack): device, dtype, shape and contiguity are checked before a kernel gets a
// pointer.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace lowlat {

namespace nb = nanobind;

using Array = nb::ndarray<>;

enum class Type { bf16, fp16, fp32, int8, uint8, int32, int64 };

constexpr std::int64_t kAnySize = -1;

inline const char* name_of(Type type) {
  constexpr const char* kNames[] = {"bfloat16", "float16", "float32", "int8", "uint8", "int32", "int64"};
  return kNames[static_cast<int>(type)];
}

inline bool has_type(const Array& array, Type type) {
  using Code = nb::dlpack::dtype_code;
  const auto is = [&](Code code, int bits) {
    const nb::dlpack::dtype dtype = array.dtype();
    return dtype.code == static_cast<std::uint8_t>(code) && dtype.bits == bits && dtype.lanes == 1;
  };
  switch (type) {
    case Type::bf16: return is(Code::Bfloat, 16);
    case Type::fp16: return is(Code::Float, 16);
    case Type::fp32: return is(Code::Float, 32);
    case Type::int8: return is(Code::Int, 8);
    case Type::uint8: return is(Code::UInt, 8);
    case Type::int32: return is(Code::Int, 32);
    case Type::int64: return is(Code::Int, 64);
  }
  return false;
}

inline bool is_contiguous(const Array& array, std::size_t from = 0) {
  std::int64_t expected = 1;
  for (std::size_t i = array.ndim(); i-- > from;) {
    if (array.shape(i) == 0) return true;
    if (array.shape(i) != 1 && array.stride(i) != expected) return false;
    expected *= static_cast<std::int64_t>(array.shape(i));
  }
  return true;
}

inline void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

inline std::int64_t size(const Array& array, std::size_t axis) {
  if (axis >= array.ndim()) throw std::invalid_argument("a tensor has too few dimensions");
  return static_cast<std::int64_t>(array.shape(axis));
}

// Throws std::invalid_argument unless the tensor is on the CPU and has this type and shape.
inline void check(const Array& array, const char* name, Type type, std::initializer_list<std::int64_t> shape) {
  const auto fail = [&](const std::string& what) { throw std::invalid_argument(std::string(name) + " " + what); };
  if (array.device_type() != nb::device::cpu::value) fail("is not on the CPU");
  if (!has_type(array, type)) fail(std::string("is not ") + name_of(type));
  if (array.ndim() != shape.size()) fail("has not " + std::to_string(shape.size()) + " dimensions");
  std::size_t axis = 0;
  for (const std::int64_t wanted : shape) {
    const std::int64_t found = size(array, axis);
    if (wanted != kAnySize && wanted != found) {
      fail("has " + std::to_string(found) + " elements along axis " + std::to_string(axis) + ", not " +
           std::to_string(wanted));
    }
    ++axis;
  }
}

// The elements of a contiguous tensor.
template <class T>
T* elements(const Array& array, const char* name, Type type, std::initializer_list<std::int64_t> shape) {
  check(array, name, type, shape);
  if (!is_contiguous(array)) throw std::invalid_argument(std::string(name) + " is not contiguous");
  return static_cast<T*>(const_cast<void*>(static_cast<const void*>(array.data())));
}

}  // namespace lowlat
