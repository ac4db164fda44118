#include "../scale_rows_arguments.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace fastmem {
namespace {

using torch::stable::Tensor;

// below this many elements a second thread costs more than it saves
constexpr int64_t kGrainElements = 32768;

void scale_rows_(std::vector<Tensor> weights, const Tensor& rows, std::vector<int64_t> stops, double factor) {
  check_scale_rows(weights, rows, stops);
  const int64_t* row_data = rows.const_data_ptr<int64_t>();
  with_row_type(weights[0].scalar_type(), [&](auto value) {
    using T = decltype(value);
    const auto wide = static_cast<typename Wide<T>::type>(factor);
    for (size_t first = 0; first < weights.size(); first += kMatricesPerLaunch) {
      const RowTable table = make_row_table(weights, stops, first);
      const int64_t* launch_rows = row_data + (first == 0 ? 0 : stops[first - 1]);
      const int64_t grain = kGrainElements / std::max<int64_t>(1, table.width[0]) + 1;
      torch::stable::parallel_for(0, table.stop[table.matrices - 1], grain, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
          scale_item<T>(table, launch_rows, item, wide, 0, 1);
        }
      });
    }
  });
}

} // namespace
} // namespace fastmem

// the namespace belongs to fc1_response.cpp; rows are always on the CPU, where they can be checked
STABLE_TORCH_LIBRARY_FRAGMENT(fastmem, library) {
  library.def("scale_rows_(Tensor(a!)[] weights, Tensor rows, int[] stops, float factor) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastmem, CPU, library) {
  library.impl("scale_rows_", TORCH_BOX(&fastmem::scale_rows_));
}
