#include "segment_abs_mean.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cuda_runtime.h>

#include <algorithm>

namespace fastmem {
namespace {

using torch::stable::Tensor;

constexpr int kThreads = 256;

// the spans travel as a kernel argument (2 KB of the 4 KB allowed): no copy, no wait, and a graph can capture the launch
constexpr int64_t kSpansPerLaunch = 128;

struct Spans {
  int64_t start[kSpansPerLaunch];
  int64_t stop[kSpansPerLaunch];
};

// one thread per image, segment and unit; neighbouring threads read neighbouring units
__global__ void segment_abs_mean_kernel(
    const float* __restrict__ hidden, // [images, positions, units]
    float* __restrict__ mean, // [images, segments, units]
    const __grid_constant__ Spans spans,
    int64_t images,
    int64_t positions,
    int64_t units,
    int64_t segments,
    int64_t first_segment,
    int64_t launch_segments) {
  const int64_t total = images * launch_segments * units;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; item < total; item += step) {
    const int64_t unit = item % units;
    const int64_t segment = item / units % launch_segments;
    const int64_t image = item / units / launch_segments;
    const int64_t rows = spans.stop[segment] - spans.start[segment];
    const float* x = hidden + (image * positions + spans.start[segment]) * units + unit;
    float sum = 0.0f;
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4, x += 4 * units) {
      sum = add_abs(sum, x[0], x[units], x[2 * units], x[3 * units]);
    }
    for (; row < rows; ++row, x += units) {
      sum = add_abs(sum, *x);
    }
    mean[(image * segments + first_segment + segment) * units + unit] = sum / static_cast<float>(rows);
  }
}

Tensor segment_abs_mean(const Tensor& hidden, std::vector<int64_t> starts, std::vector<int64_t> stops) {
  check_segments("segment_abs_mean", hidden, starts, stops);
  const int64_t images = hidden.size(0);
  const int64_t positions = hidden.size(1);
  const int64_t units = hidden.size(2);
  const int64_t segments = static_cast<int64_t>(starts.size());
  const torch::stable::accelerator::DeviceGuard guard(hidden.get_device_index());
  Tensor mean = torch::stable::new_empty(hidden, {images, segments, units});
  if (mean.numel() == 0) {
    return mean;
  }
  const auto stream = torch::stable::accelerator::getCurrentStream(hidden.get_device_index());
  for (int64_t first = 0; first < segments; first += kSpansPerLaunch) {
    const int64_t launch_segments = std::min(kSpansPerLaunch, segments - first);
    Spans spans = {};
    std::copy_n(starts.begin() + first, launch_segments, spans.start);
    std::copy_n(stops.begin() + first, launch_segments, spans.stop);
    const int64_t blocks = (images * launch_segments * units + kThreads - 1) / kThreads;
    // the largest grid that every GPU takes; the loop in the kernel covers the rest
    const auto grid = static_cast<unsigned int>(std::min<int64_t>(blocks, INT32_MAX));
    segment_abs_mean_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream.nativeHandle())>>>(
        hidden.const_data_ptr<float>(),
        mean.mutable_data_ptr<float>(),
        spans,
        images,
        positions,
        units,
        segments,
        first,
        launch_segments);
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, "segment_abs_mean could not be launched: ", cudaGetErrorString(error));
  }
  return mean;
}

} // namespace
} // namespace fastmem

// the operator itself is defined by the CPU library, which is loaded first
STABLE_TORCH_LIBRARY_IMPL(fastmem, CUDA, library) {
  library.impl("segment_abs_mean", TORCH_BOX(&fastmem::segment_abs_mean));
}
