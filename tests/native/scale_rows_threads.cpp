// Runs the threads of scale_rows_'s CUDA kernel one after the other, last first, on the CPU.
#include "scale_rows.h"

#include <algorithm>

namespace {

constexpr int64_t kWarp = 32;

template <typename T>
void run(const fastmem::RowTable& table, const int64_t* rows, int64_t total, double factor) {
  const auto wide = static_cast<typename fastmem::Wide<T>::type>(factor);
  for (int64_t item = total - 1; item >= 0; --item) {
    for (int64_t lane = kWarp - 1; lane >= 0; --lane) {
      fastmem::scale_item<T>(table, rows, item, wide, lane, kWarp);
    }
  }
}

} // namespace

// type: 0 float32, 1 bfloat16, 2 float16, 3 float64
extern "C" void scale_rows(
    int type,
    void** data,
    const int64_t* width,
    const int64_t* stop,
    int64_t matrices,
    const int64_t* rows,
    int64_t total,
    double factor) {
  fastmem::RowTable table = {};
  table.matrices = matrices;
  std::copy_n(data, matrices, table.data);
  std::copy_n(width, matrices, table.width);
  std::copy_n(stop, matrices, table.stop);
  if (type == 0) {
    run<float>(table, rows, total, factor);
  } else if (type == 1) {
    run<c10::BFloat16>(table, rows, total, factor);
  } else if (type == 2) {
    run<c10::Half>(table, rows, total, factor);
  } else {
    run<double>(table, rows, total, factor);
  }
}
