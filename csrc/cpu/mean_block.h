// The segment means of fc1_response: the mean over positions start..stop-1 of |hidden| for one block of units.
//
// The sum of one segment is taken in float32, in groups of four positions from its start:
//   sum += (|x0| + |x1|) + (|x2| + |x3|), then the one to three left over one by one, then sum / count.
// The order depends on the segment alone, so any number of threads and any instruction set give the same bits.
// Four loads are in flight per step, and the rounding error grows with a quarter of the positions.
#pragma once

#include "clones.h"

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace fastmem {

inline float add_abs(float sum, float x0, float x1, float x2, float x3) {
  return sum + ((fabsf(x0) + fabsf(x1)) + (fabsf(x2) + fabsf(x3)));
}

inline float add_abs(float sum, float x) {
  return sum + fabsf(x);
}

// the border to the raw pointers: whatever is wrong past this point reads foreign memory
inline void check_segments(
    const char* name,
    const torch::stable::Tensor& hidden,
    const std::vector<int64_t>& starts,
    const std::vector<int64_t>& stops) {
  STD_TORCH_CHECK(
      hidden.scalar_type() == torch::headeronly::ScalarType::Float,
      name,
      " expected hidden of dtype float32; convert it with .float()");
  STD_TORCH_CHECK(
      hidden.dim() == 3,
      name,
      " expected hidden of shape [images, positions, units], got ",
      hidden.dim(),
      " dimensions");
  STD_TORCH_CHECK(hidden.is_contiguous(), name, " expected contiguous hidden; call .contiguous() first");
  STD_TORCH_CHECK(
      !starts.empty() && starts.size() == stops.size(),
      name,
      " expected as many stops as starts and at least one, got ",
      starts.size(),
      " starts and ",
      stops.size(),
      " stops");
  for (size_t segment = 0; segment < starts.size(); ++segment) {
    STD_TORCH_CHECK(
        0 <= starts[segment] && starts[segment] < stops[segment] && stops[segment] <= hidden.size(1),
        name,
        " expected 0 <= start < stop <= ",
        hidden.size(1),
        " (positions), got start ",
        starts[segment],
        " and stop ",
        stops[segment],
        " for segment ",
        segment);
  }
}

// sums of one block stay in the first-level cache beside the four rows that are read (2 KB each)
constexpr int64_t kBlockUnits = 512;

FASTMEM_CLONES static void mean_block(
    const float* __restrict__ first_row,
    int64_t rows,
    int64_t stride,
    int64_t width,
    float* __restrict__ mean) {
  alignas(64) float sums[kBlockUnits] = {};
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) {
    const float* x0 = first_row + row * stride;
    const float* x1 = x0 + stride;
    const float* x2 = x1 + stride;
    const float* x3 = x2 + stride;
    for (int64_t unit = 0; unit < width; ++unit) {
      sums[unit] = add_abs(sums[unit], x0[unit], x1[unit], x2[unit], x3[unit]);
    }
  }
  for (; row < rows; ++row) {
    const float* x = first_row + row * stride;
    for (int64_t unit = 0; unit < width; ++unit) {
      sums[unit] = add_abs(sums[unit], x[unit]);
    }
  }
  const float count = static_cast<float>(rows);
  for (int64_t unit = 0; unit < width; ++unit) {
    mean[unit] = sums[unit] / count;
  }
}

} // namespace fastmem
