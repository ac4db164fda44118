// What both homes of scale_rows_ do with their arguments: check them all before the first row is touched.
#pragma once

#include "scale_rows.h"

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <vector>

namespace fastmem {

inline void check_scale_rows(
    const std::vector<torch::stable::Tensor>& weights,
    const torch::stable::Tensor& rows,
    const std::vector<int64_t>& stops) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(
      !weights.empty() && weights.size() == stops.size(),
      "scale_rows_ expected as many stops as matrices and at least one, got ",
      weights.size(),
      " matrices and ",
      stops.size(),
      " stops");
  STD_TORCH_CHECK(
      rows.is_cpu() && rows.dim() == 1 && rows.is_contiguous() && rows.scalar_type() == ScalarType::Long,
      "scale_rows_ expected rows as one contiguous int64 tensor on the CPU");
  const int64_t* row = rows.const_data_ptr<int64_t>();
  int64_t first = 0;
  for (size_t m = 0; m < weights.size(); ++m) {
    const auto& weight = weights[m];
    STD_TORCH_CHECK(
        weight.dim() == 2 && weight.is_contiguous() && weight.scalar_type() == weights[0].scalar_type() &&
            weight.device() == weights[0].device(),
        "scale_rows_ expected contiguous matrices of one dtype on one device, got another as number ",
        m);
    STD_TORCH_CHECK(
        first <= stops[m] && stops[m] <= rows.numel(),
        "scale_rows_ expected stops that grow to the number of rows (",
        rows.numel(),
        "), got ",
        stops[m],
        " for matrix ",
        m);
    std::vector<int64_t> sorted(row + first, row + stops[m]);
    std::sort(sorted.begin(), sorted.end());
    STD_TORCH_CHECK(
        sorted.empty() || (sorted.front() >= 0 && sorted.back() < weight.size(0)),
        "scale_rows_ expected rows in 0..",
        weight.size(0) - 1,
        " of matrix ",
        m,
        ", got others");
    // two threads at one row would multiply it twice, or once and a half
    STD_TORCH_CHECK(
        std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end(),
        "scale_rows_ expected every row of matrix ",
        m,
        " once, got one twice");
    first = stops[m];
  }
  STD_TORCH_CHECK(
      first == rows.numel(), "scale_rows_ expected stops that end at the number of rows, got ", first);
}

// matrices first .. first + table.matrices - 1; stops count from the first of them
inline RowTable make_row_table(
    const std::vector<torch::stable::Tensor>& weights, const std::vector<int64_t>& stops, size_t first) {
  RowTable table = {};
  table.matrices = std::min<int64_t>(kMatricesPerLaunch, weights.size() - first);
  const int64_t before = first == 0 ? 0 : stops[first - 1];
  for (int64_t m = 0; m < table.matrices; ++m) {
    table.data[m] = weights[first + m].mutable_data_ptr();
    table.width[m] = weights[first + m].size(1);
    table.stop[m] = stops[first + m] - before;
  }
  return table;
}

// calls run(T()) with a value of the matrices' C++ type
template <typename Run>
void with_row_type(torch::headeronly::ScalarType type, const Run& run) {
  using torch::headeronly::ScalarType;
  if (type == ScalarType::Float) {
    run(float());
  } else if (type == ScalarType::Double) {
    run(double());
  } else if (type == ScalarType::BFloat16) {
    run(c10::BFloat16());
  } else if (type == ScalarType::Half) {
    run(c10::Half());
  } else {
    STD_TORCH_CHECK(false, "scale_rows_ expected float32, float64, bfloat16 or float16, got ", toString(type));
  }
}

} // namespace fastmem
