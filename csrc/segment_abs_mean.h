// segment_abs_mean: mean over positions start..stop-1 of |hidden|, for every image, segment and unit.
//
//   hidden [images, positions, units] float32, starts/stops int64 [segments] -> [images, segments, units] float32
//   reads (stop - start) * units * 4 bytes per image and segment, writes units * 4
//
// The sum of one segment is taken in float32, in groups of four positions from its start:
//   sum += (|x0| + |x1|) + (|x2| + |x3|), then the one to three left over one by one, then sum / count.
// The order depends on the segment alone, so any number of threads, any instruction set and the GPU give the same bits.
// Four loads are in flight per step, and the rounding error grows with a quarter of the positions.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#ifdef __CUDACC__
#define FASTMEM_HOST_DEVICE __host__ __device__ inline
#else
#define FASTMEM_HOST_DEVICE inline
#endif

namespace fastmem {

FASTMEM_HOST_DEVICE float add_abs(float sum, float x0, float x1, float x2, float x3) {
  return sum + ((fabsf(x0) + fabsf(x1)) + (fabsf(x2) + fabsf(x3)));
}

FASTMEM_HOST_DEVICE float add_abs(float sum, float x) {
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

} // namespace fastmem
