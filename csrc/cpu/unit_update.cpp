// unit_update_: folds a batch of responses into the running statistics of every unit, in place.
//
//   response [images, views, units] float32; r(i) = mean over the views in float64, rounded to float32
//   mean, m2 [units] float64: Chan's merge with the r(i), one by one
//   view_total [units] float64 += sum over i of the population variance over the views
//   top_value float32, top_image int64 [units, k]: the k largest r with their ids, best first, the smaller id first
//   reads 4 * images * views * units bytes, reads and writes (24 + 12 k) * units bytes of state
#include "clones.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <vector>

namespace fastmem {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// one block's float64 sums stay in the first-level cache
constexpr int64_t kBlockUnits = 512;

struct Block {
  double* mean;
  double* m2;
  double* view_total;
  float* top_value;
  int64_t* top_image;
  int64_t width;
};

// mean over the views of one image, and what its views vary, added to view_total
FASTMEM_CLONES void reduce_views(
    const float* response, int64_t views, int64_t stride, int64_t width, float* value, double* view_total) {
  alignas(64) double sums[kBlockUnits] = {};
  alignas(64) double spread[kBlockUnits] = {};
  for (int64_t view = 0; view < views; ++view) {
    const float* r = response + view * stride;
    for (int64_t unit = 0; unit < width; ++unit) {
      sums[unit] += r[unit];
    }
  }
  const double count = static_cast<double>(views);
  for (int64_t unit = 0; unit < width; ++unit) {
    sums[unit] /= count;
    value[unit] = static_cast<float>(sums[unit]);
  }
  for (int64_t view = 0; view < views; ++view) {
    const float* r = response + view * stride;
    for (int64_t unit = 0; unit < width; ++unit) {
      const double delta = r[unit] - sums[unit];
      spread[unit] += delta * delta;
    }
  }
  for (int64_t unit = 0; unit < width; ++unit) {
    view_total[unit] += spread[unit] / count;
  }
}

FASTMEM_CLONES void merge_moments(const float* value, double count, int64_t width, double* mean, double* m2) {
  for (int64_t unit = 0; unit < width; ++unit) {
    const double delta = value[unit] - mean[unit];
    mean[unit] += delta / count;
    m2[unit] += delta * (value[unit] - mean[unit]);
  }
}

inline bool comes_before(float value, int64_t image, float other_value, int64_t other_image) {
  return value > other_value || (value == other_value && image < other_image);
}

void insert_largest(const float* value, int64_t image, int64_t k, const Block& block) {
  for (int64_t unit = 0; unit < block.width; ++unit) {
    float* values = block.top_value + unit * k;
    int64_t* images = block.top_image + unit * k;
    int64_t place = k;
    while (place > 0 && comes_before(value[unit], image, values[place - 1], images[place - 1])) {
      --place;
    }
    if (place == k) {
      continue;
    }
    std::copy_backward(values + place, values + k - 1, values + k);
    std::copy_backward(images + place, images + k - 1, images + k);
    values[place] = value[unit];
    images[place] = image;
  }
}

void check_state(const Tensor& tensor, ScalarType type, int64_t size, const char* name) {
  STD_TORCH_CHECK(
      tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == type && tensor.numel() == size,
      "unit_update_ expected ",
      name,
      " as a contiguous tensor of ",
      size,
      " values of type ",
      toString(type),
      " on the CPU");
}

void unit_update_(
    Tensor mean,
    Tensor m2,
    Tensor view_total,
    Tensor top_value,
    Tensor top_image,
    int64_t count,
    const Tensor& response,
    const Tensor& image_ids) {
  STD_TORCH_CHECK(
      response.dim() >= 2 && response.size(1) > 0 && top_value.dim() >= 1,
      "unit_update_ expected response of shape [images, views, ...] with at least one view");
  const int64_t images = response.size(0);
  const int64_t views = response.size(1);
  const int64_t units = mean.numel();
  const int64_t k = top_value.size(top_value.dim() - 1);
  STD_TORCH_CHECK(k > 0, "unit_update_ expected room for at least one largest response");
  check_state(mean, ScalarType::Double, units, "mean");
  check_state(m2, ScalarType::Double, units, "m2");
  check_state(view_total, ScalarType::Double, units, "view_total");
  check_state(top_value, ScalarType::Float, units * k, "top_value");
  check_state(top_image, ScalarType::Long, units * k, "top_image");
  check_state(response, ScalarType::Float, images * views * units, "response");
  check_state(image_ids, ScalarType::Long, images, "image_ids");
  double* mean_data = mean.mutable_data_ptr<double>();
  double* m2_data = m2.mutable_data_ptr<double>();
  double* view_data = view_total.mutable_data_ptr<double>();
  float* value_data = top_value.mutable_data_ptr<float>();
  int64_t* image_data = top_image.mutable_data_ptr<int64_t>();
  const float* response_data = response.const_data_ptr<float>();
  const int64_t* id_data = image_ids.const_data_ptr<int64_t>();

  const int64_t blocks = (units + kBlockUnits - 1) / kBlockUnits;
  torch::stable::parallel_for(0, blocks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item * kBlockUnits;
      const Block block = {
          mean_data + first,
          m2_data + first,
          view_data + first,
          value_data + first * k,
          image_data + first * k,
          std::min(kBlockUnits, units - first)};
      alignas(64) float value[kBlockUnits];
      for (int64_t image = 0; image < images; ++image) {
        const float* r = response_data + image * views * units + first;
        reduce_views(r, views, units, block.width, value, block.view_total);
        merge_moments(value, static_cast<double>(count + image + 1), block.width, block.mean, block.m2);
        insert_largest(value, id_data[image], k, block);
      }
    }
  });
}

} // namespace
} // namespace fastmem

STABLE_TORCH_LIBRARY_FRAGMENT(fastmem, library) {
  library.def(
      "unit_update_(Tensor(a!) mean, Tensor(b!) m2, Tensor(c!) view_total, Tensor(d!) top_value, Tensor(e!) top_image,"
      " int count, Tensor response, Tensor image_ids) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastmem, CPU, library) {
  library.impl("unit_update_", TORCH_BOX(&fastmem::unit_update_));
}
