// Arguments of token sampling: temperature, top-k, top-p and min-p over one row of logits.
#pragma once

#include <cstdint>

namespace lowlat {

// Logits per work item: sums of items are added in order, so bits do not depend on the number of threads.
constexpr std::int64_t kDrawPiece = 8192;

constexpr std::int64_t draw_pieces(std::int64_t size) { return (size + kDrawPiece - 1) / kDrawPiece; }

// Per work item:
struct DrawPiece {
  float largest;
  double above;       // weight of the kept logits above the last kept one
  std::int64_t ties;  // logits equal to the last kept one
};

// Radix selection of the cut-off logit by 11, 11 and 10 bits: this many bins per pass.
constexpr std::int64_t kDrawLevels = 3, kDrawBins = 2048;
// Padding, so that the bins of work items do not map to the same cache sets.
constexpr std::int64_t kDrawBinStride = kDrawBins + 8;

struct DrawPass {
  const float* logits = nullptr;  // [size]
  std::int64_t size = 0;
  double temperature = 1;
  std::int64_t top_k = 0;  // 0: all
  double top_p = 1, min_p = 0;
  double number = 0;               // uniform random number in [0, 1)
  double* weights = nullptr;       // [size] scratch
  double* bins = nullptr;          // [kDrawLevels, draw_pieces(size), kDrawBinStride] scratch
  DrawPiece* pieces = nullptr;     // [draw_pieces(size)] scratch
  std::int64_t* token = nullptr;   // the result; not written if the largest logit is not finite
};

}  // namespace lowlat
