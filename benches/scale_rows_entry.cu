// A C entry point to the CUDA kernel of scale_rows_, for a bench on a machine whose torch the operators cannot load into.
#include "../csrc/cuda/scale_rows_kernel.h"

namespace {

template <typename T>
int scale(void** data, const int64_t* width, const int64_t* stop, int64_t matrices, const int64_t* rows, int64_t total, double factor, void* stream) {
  fastmem::RowTable table = {};
  if (matrices > fastmem::kMatricesPerLaunch) {
    return cudaErrorInvalidValue;
  }
  table.matrices = matrices;
  std::copy_n(data, matrices, table.data);
  std::copy_n(width, matrices, table.width);
  std::copy_n(stop, matrices, table.stop);
  return fastmem::launch_scale_rows<T>(table, rows, total, factor, static_cast<cudaStream_t>(stream));
}

} // namespace

// type: 0 float32, 1 bfloat16, 2 float16, 3 float64; returns a CUDA error, 0 when launched
extern "C" __attribute__((visibility("default"))) int fastmem_scale_rows(
    int type, void** data, const int64_t* width, const int64_t* stop, int64_t matrices, const int64_t* rows,
    int64_t total, double factor, void* stream) {
  switch (type) {
    case 0:
      return scale<float>(data, width, stop, matrices, rows, total, factor, stream);
    case 1:
      return scale<c10::BFloat16>(data, width, stop, matrices, rows, total, factor, stream);
    case 2:
      return scale<c10::Half>(data, width, stop, matrices, rows, total, factor, stream);
    case 3:
      return scale<double>(data, width, stop, matrices, rows, total, factor, stream);
    default:
      return cudaErrorInvalidValue;
  }
}
