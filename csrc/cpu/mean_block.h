// The segment mean of one block of units, shared by the operators that need it.
#pragma once

#include "../segment_abs_mean.h"
#include "clones.h"

namespace fastmem {

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
