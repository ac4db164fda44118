#include "segment_abs_mean.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

// one source, compiled three times, chosen when the library is loaded
#if defined(__x86_64__) && defined(__linux__)
#define FASTMEM_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FASTMEM_CLONES
#endif

namespace fastmem {
namespace {

using torch::stable::Tensor;

// sums of one block stay in the first-level cache beside the four rows that are read (2 KB each)
constexpr int64_t kBlockUnits = 512;

// below this many elements a second thread costs more than it saves
constexpr int64_t kGrainElements = 32768;

FASTMEM_CLONES void mean_block(
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

Tensor segment_abs_mean(const Tensor& hidden, std::vector<int64_t> starts, std::vector<int64_t> stops) {
  check_arguments(hidden, starts, stops);
  const int64_t images = hidden.size(0);
  const int64_t positions = hidden.size(1);
  const int64_t units = hidden.size(2);
  const int64_t segments = static_cast<int64_t>(starts.size());
  Tensor mean = torch::stable::new_empty(hidden, {images, segments, units});
  const float* hidden_data = hidden.const_data_ptr<float>();
  float* mean_data = mean.mutable_data_ptr<float>();

  // segments have very different lengths, so the threads share images x unit blocks and each does all segments of its own
  const int64_t blocks = (units + kBlockUnits - 1) / kBlockUnits;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (positions * kBlockUnits));
  torch::stable::parallel_for(0, images * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t image = item / blocks;
      const int64_t first_unit = item % blocks * kBlockUnits;
      const int64_t width = std::min(kBlockUnits, units - first_unit);
      for (int64_t segment = 0; segment < segments; ++segment) {
        mean_block(
            hidden_data + (image * positions + starts[segment]) * units + first_unit,
            stops[segment] - starts[segment],
            units,
            width,
            mean_data + (image * segments + segment) * units + first_unit);
      }
    }
  });
  return mean;
}

} // namespace
} // namespace fastmem

STABLE_TORCH_LIBRARY(fastmem, library) {
  library.def("segment_abs_mean(Tensor hidden, int[] starts, int[] stops) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastmem, CPU, library) {
  library.impl("segment_abs_mean", TORCH_BOX(&fastmem::segment_abs_mean));
}
