// Arguments of the search for scales by weighted error (lowlat/ops/weighted_quantization.py), alone and with error
// feedback (lowlat/ops/calibrated_quantization.py). Both run on the calling thread: callers share rows among threads.
#pragma once

#include <cstdint>
#include <vector>

namespace lowlat {

// Columns whose errors feed back within one call.
constexpr std::int64_t kFeedbackColumns = 128;

struct ScaleSearch {
  const float* rows = nullptr;  // [count, columns], `stride` elements apart; whole tiles
  std::int64_t count = 0, columns = 0, stride = 0;
  const float* importance = nullptr;    // [columns]
  std::uint16_t* scale = nullptr;       // fp16 [count, groups]
  std::uint16_t* minimum = nullptr;     // fp16 [count, groups], of int4
  std::vector<double> shrinks;          // shares of a range to cut off at an end (int4), factors on a scale (int8)
  int refits = 0;                       // least squares fits per candidate
  const float* factor = nullptr;        // [columns, columns] upper triangular, `factor_stride` apart: error feedback
  std::int64_t factor_stride = 0;
  float* q = nullptr;                   // [count, groups, 32], with feedback
  float* errors = nullptr;              // [count, columns], with feedback
};

}  // namespace lowlat
