// The CUDA kernel of scale_rows_ and its launch, free of torch tensors, so that it can be built without torch's library.
#pragma once

#include "../scale_rows.h"

#include <cuda_runtime.h>

#include <algorithm>

namespace fastmem {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 8;

// one warp per row: a row is 1 to 8 KB, so every lane has a few 16-byte accesses
template <typename T>
__global__ void scale_rows_kernel(
    const __grid_constant__ RowTable table,
    const int64_t* __restrict__ rows,
    int64_t total,
    typename Wide<T>::type factor) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  for (int64_t item = first; item < total; item += step) {
    scale_item<T>(table, rows, item, factor, threadIdx.x % kWarp, kWarp);
  }
}

// rows lie on the GPU; returns what the launch says
template <typename T>
cudaError_t launch_scale_rows(
    const RowTable& table, const int64_t* rows, int64_t total, double factor, cudaStream_t stream) {
  const int64_t blocks = (total + kWarpsPerBlock - 1) / kWarpsPerBlock;
  const auto grid = static_cast<unsigned int>(std::min<int64_t>(blocks, INT32_MAX));
  scale_rows_kernel<T><<<grid, kWarp * kWarpsPerBlock, 0, stream>>>(
      table, rows, total, static_cast<typename Wide<T>::type>(factor));
  return cudaGetLastError();
}

} // namespace fastmem
