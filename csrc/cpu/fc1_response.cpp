// bias_gelu_response_: what follows the matrix product of fc1, in one pass over it.
//
//   linear [images, positions, units] float32, the product x W^T without bias, becomes hidden = GELU(linear + bias)
//   response [images, segments, units] = mean of |hidden| (or of |linear + bias|) over starts..stops
//   moves 8 bytes per element of linear from and to memory, and 4 per element of response
//
// A block of units is finished for all positions of an image while it lies in the second-level cache, and the means are
// taken from there in the order of mean_block.h: the same bits for any number of threads and instruction set.
#include "gelu.h"
#include "mean_block.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace fastmem {
namespace {

using torch::stable::Tensor;

// 258 or 680 positions of 256 units are 0.26 or 0.7 MB
constexpr int64_t kPanelUnits = 256;

FASTMEM_CLONES void add_bias(
    float* panel, int64_t rows, int64_t stride, int64_t width, const float* __restrict__ bias) {
  for (int64_t row = 0; row < rows; ++row) {
    float* __restrict__ x = panel + row * stride;
    for (int64_t unit = 0; unit < width; ++unit) {
      x[unit] += bias[unit];
    }
  }
}

FASTMEM_CLONES void add_bias_gelu_erf(
    float* panel, int64_t rows, int64_t stride, int64_t width, const float* __restrict__ bias) {
  for (int64_t row = 0; row < rows; ++row) {
    float* __restrict__ x = panel + row * stride;
    for (int64_t unit = 0; unit < width; ++unit) {
      x[unit] = gelu_erf(x[unit] + bias[unit]);
    }
  }
}

FASTMEM_CLONES void add_bias_gelu_tanh(
    float* panel, int64_t rows, int64_t stride, int64_t width, const float* __restrict__ bias) {
  for (int64_t row = 0; row < rows; ++row) {
    float* __restrict__ x = panel + row * stride;
    for (int64_t unit = 0; unit < width; ++unit) {
      x[unit] = gelu_tanh(x[unit] + bias[unit]);
    }
  }
}

Tensor bias_gelu_response_(
    Tensor linear,
    const Tensor& bias,
    std::vector<int64_t> starts,
    std::vector<int64_t> stops,
    bool tanh,
    bool pre_activation) {
  check_segments("bias_gelu_response_", linear, starts, stops);
  const int64_t images = linear.size(0);
  const int64_t positions = linear.size(1);
  const int64_t units = linear.size(2);
  STD_TORCH_CHECK(
      bias.scalar_type() == torch::headeronly::ScalarType::Float && bias.is_cpu() && bias.dim() == 1 &&
          bias.size(0) == units && bias.is_contiguous(),
      "bias_gelu_response_ expected bias as contiguous float32 [",
      units,
      "] on the CPU");
  const int64_t segments = static_cast<int64_t>(starts.size());
  Tensor response = torch::stable::new_empty(linear, {images, segments, units});
  float* linear_data = linear.mutable_data_ptr<float>();
  float* response_data = response.mutable_data_ptr<float>();
  const float* bias_data = bias.const_data_ptr<float>();
  const auto activate = tanh ? add_bias_gelu_tanh : add_bias_gelu_erf;
  static constexpr float kNoBias[kPanelUnits] = {};

  const int64_t panels = (units + kPanelUnits - 1) / kPanelUnits;
  torch::stable::parallel_for(0, images * panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t image = item / panels;
      const int64_t first_unit = item % panels * kPanelUnits;
      const int64_t width = std::min(kPanelUnits, units - first_unit);
      float* panel = linear_data + image * positions * units + first_unit;
      (pre_activation ? add_bias : activate)(panel, positions, units, width, bias_data + first_unit);
      for (int64_t segment = 0; segment < segments; ++segment) {
        mean_block(
            panel + starts[segment] * units,
            stops[segment] - starts[segment],
            units,
            width,
            response_data + (image * segments + segment) * units + first_unit);
      }
      if (pre_activation) {
        activate(panel, positions, units, width, kNoBias);
      }
    }
  });
  return response;
}

} // namespace
} // namespace fastmem

STABLE_TORCH_LIBRARY(fastmem, library) {
  library.def(
      "bias_gelu_response_(Tensor(a!) linear, Tensor bias, int[] starts, int[] stops, bool tanh, bool pre_activation)"
      " -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastmem, CPU, library) {
  library.impl("bias_gelu_response_", TORCH_BOX(&fastmem::bias_gelu_response_));
}
