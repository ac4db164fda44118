#include "../scale_rows_arguments.h"
#include "scale_rows_kernel.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace fastmem {
namespace {

using torch::stable::Tensor;

void scale_rows_(std::vector<Tensor> weights, const Tensor& rows, std::vector<int64_t> stops, double factor) {
  check_scale_rows(weights, rows, stops);
  if (rows.numel() == 0) {
    return;
  }
  const auto device = weights[0].device();
  const torch::stable::accelerator::DeviceGuard guard(device.index());
  const Tensor on_device = torch::stable::to(rows, device);
  const auto stream = torch::stable::accelerator::getCurrentStream(device.index());
  for (size_t first = 0; first < weights.size(); first += kMatricesPerLaunch) {
    const RowTable table = make_row_table(weights, stops, first);
    const int64_t before = first == 0 ? 0 : stops[first - 1];
    const int64_t total = table.stop[table.matrices - 1];
    if (total == 0) {
      continue;
    }
    const int64_t* launch_rows = on_device.const_data_ptr<int64_t>() + before;
    with_row_type(weights[0].scalar_type(), [&](auto value) {
      const cudaError_t error = launch_scale_rows<decltype(value)>(
          table, launch_rows, total, factor, static_cast<cudaStream_t>(stream.nativeHandle()));
      STD_TORCH_CHECK(error == cudaSuccess, "scale_rows_ could not be launched: ", cudaGetErrorString(error));
    });
  }
}

} // namespace
} // namespace fastmem

STABLE_TORCH_LIBRARY_IMPL(fastmem, CUDA, library) {
  library.impl("scale_rows_", TORCH_BOX(&fastmem::scale_rows_));
}
