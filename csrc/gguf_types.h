// Quantized types of weights in blocks: number, columns and bytes of a block. Those of GGUF files have the numbers and
// sizes of the gguf package's GGML_QUANT_SIZES; numbers from 200 are int4 weights of safetensors files
// (lowlat/ops/int4_blocks.py).
#pragma once

#include <cstdint>

namespace lowlat {

// X(name, number, columns, bytes)
#define LOWLAT_GGUF_TYPES(X) \
  X(Q4_0, 2, 32, 18)         \
  X(Q4_1, 3, 32, 20)         \
  X(Q5_0, 6, 32, 22)         \
  X(Q5_1, 7, 32, 24)         \
  X(Q8_0, 8, 32, 34)         \
  X(Q2_K, 10, 256, 84)       \
  X(Q3_K, 11, 256, 110)      \
  X(Q4_K, 12, 256, 144)      \
  X(Q5_K, 13, 256, 176)      \
  X(Q6_K, 14, 256, 210)      \
  X(IQ2_XXS, 16, 256, 66)    \
  X(IQ2_XS, 17, 256, 74)     \
  X(IQ3_XXS, 18, 256, 98)    \
  X(IQ1_S, 19, 256, 50)      \
  X(IQ4_NL, 20, 32, 18)      \
  X(IQ3_S, 21, 256, 110)     \
  X(IQ2_S, 22, 256, 82)      \
  X(IQ4_XS, 23, 256, 136)    \
  X(IQ1_M, 29, 256, 56)      \
  X(TQ1_0, 34, 256, 54)      \
  X(TQ2_0, 35, 256, 66)      \
  X(MXFP4, 39, 32, 17)       \
  X(NVFP4, 40, 64, 36)       \
  X(INT4_BF16, 200, 32, 18)  \
  X(INT4_32, 201, 32, 20)    \
  X(INT4_128, 202, 128, 68)

enum class GgufType : std::uint8_t {
#define LOWLAT_NUMBER(name, number, columns, bytes) name = number,
  LOWLAT_GGUF_TYPES(LOWLAT_NUMBER)
#undef LOWLAT_NUMBER
};

struct GgufTypeInfo {
  GgufType type;
  const char* name;
  std::int64_t columns, bytes;  // of a block
};

// Not inline: levels are linked apart (cmake/levels.cmake), and a table with names would be defined twice.
constexpr GgufTypeInfo kGgufTypes[] = {
#define LOWLAT_INFO(name, number, columns, bytes) {GgufType::name, #name, columns, bytes},
    LOWLAT_GGUF_TYPES(LOWLAT_INFO)
#undef LOWLAT_INFO
};

// The type with a number, or null.
constexpr const GgufTypeInfo* find_gguf_type(std::int64_t number) {
  for (const GgufTypeInfo& info : kGgufTypes) {
    if (static_cast<std::int64_t>(info.type) == number) return &info;
  }
  return nullptr;
}

// The order of a block's elements: bytes, numbers of 2 bytes, words of 4 bytes, numbers of 2 bytes.
struct GgufElements {
  int bytes, halves, words, last_halves = 0;
};

// Elements of the types that are faster interleaved (matrix.h); none for the others.
constexpr GgufElements gguf_elements(GgufType type) {
  switch (type) {
    case GgufType::Q4_0:
    case GgufType::INT4_BF16:
    case GgufType::IQ4_NL: return {0, 1, 4};
    case GgufType::Q4_1: return {0, 2, 4};
    case GgufType::Q5_0: return {0, 1, 5};
    case GgufType::Q5_1: return {0, 2, 5};
    case GgufType::Q8_0: return {0, 1, 8};
    case GgufType::Q2_K: return {0, 0, 20, 2};
    case GgufType::Q3_K: return {0, 0, 27, 1};
    case GgufType::Q4_K: return {0, 2, 35};
    case GgufType::Q5_K: return {0, 2, 43};
    case GgufType::Q6_K: return {0, 0, 52, 1};
    case GgufType::IQ4_XS: return {0, 2, 33};
    case GgufType::IQ2_XXS: return {0, 1, 16};
    case GgufType::MXFP4: return {1, 0, 4};
    case GgufType::INT4_32: return {0, 0, 5};
    case GgufType::INT4_128: return {0, 0, 17};
    default: return {0, 0, 0};
  }
}

constexpr bool can_interleave(GgufType type) { return gguf_elements(type).words > 0; }

// Calls body(offset, size) for every element of a block.
template <class Body>
inline void each_gguf_element(GgufType type, Body&& body) {
  const GgufElements elements = gguf_elements(type);
  std::int64_t offset = 0;
  for (int i = 0; i < elements.bytes; ++i, ++offset) body(offset, 1);
  for (int i = 0; i < elements.halves; ++i, offset += 2) body(offset, 2);
  for (int i = 0; i < elements.words; ++i, offset += 4) body(offset, 4);
  for (int i = 0; i < elements.last_halves; ++i, offset += 2) body(offset, 2);
}

// Calls body.operator()<type>() for the run-time value of `type`.
template <class Body>
inline void with_gguf_type(GgufType type, Body&& body) {
  switch (type) {
#define LOWLAT_CASE(name, number, columns, bytes) \
  case GgufType::name: return body.template operator()<GgufType::name>();
    LOWLAT_GGUF_TYPES(LOWLAT_CASE)
#undef LOWLAT_CASE
  }
}

}  // namespace lowlat
