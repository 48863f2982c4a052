// Arguments of the draw of one token from one row of logits.
#pragma once

#include <cstdint>

namespace lowlat {

// Logits that one thread works on at a time: their sums are added in order, so the bits would not depend on threads.
constexpr std::int64_t kDrawPiece = 8192;

constexpr std::int64_t draw_pieces(std::int64_t size) { return (size + kDrawPiece - 1) / kDrawPiece; }

// What is known of a piece.
struct DrawPiece {
  float largest;
  double above;       // sum of the weights that are kept for a logit above the last one kept
  std::int64_t ties;  // logits equal to that one
};

// The ranking is looked through from its front by 11, 11 and 10 bits of the logits: so many bins for each.
constexpr std::int64_t kDrawLevels = 3, kDrawBins = 2048;
// Apart enough for the bins of pieces not to share their places in a cache.
constexpr std::int64_t kDrawBinStride = kDrawBins + 8;

struct DrawPass {
  const float* logits = nullptr;  // [size]
  std::int64_t size = 0;
  double temperature = 1;
  std::int64_t top_k = 0;  // 0: all
  double top_p = 1, min_p = 0;
  double number = 0;               // in [0, 1)
  double* weights = nullptr;       // [size] room
  double* bins = nullptr;          // [kDrawLevels, draw_pieces(size), kDrawBinStride] room
  DrawPiece* pieces = nullptr;     // [draw_pieces(size)] room
  std::int64_t* token = nullptr;   // the result; untouched where the largest logit is not finite
};

}  // namespace lowlat
