#include "mean_block.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace fastmem {
namespace {

using torch::stable::Tensor;

// below this many elements a second thread costs more than it saves
constexpr int64_t kGrainElements = 32768;

Tensor segment_abs_mean(const Tensor& hidden, std::vector<int64_t> starts, std::vector<int64_t> stops) {
  check_segments("segment_abs_mean", hidden, starts, stops);
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
