// scale_rows_: multiplies chosen rows of many matrices by one factor, in place.
//
//   matrices [height, width] of one dtype, rows int64 [total] (those of the first matrix, then of the second, ...)
//   moves 2 * total * width * sizeof(T) bytes and 8 * total of row numbers; total * width multiplications
//
// The product is taken in float (double for double) and rounded once to the matrix's type, which is what torch's
// `matrix[rows] *= factor` does, bit for bit. Plain C++, so that a host program can run the GPU's threads one by one.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#ifdef __CUDACC__
#define FASTMEM_HOST_DEVICE __host__ __device__ inline
#else
#define FASTMEM_HOST_DEVICE inline
#endif

namespace fastmem {

template <typename T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};

// what a launch is told: 3 KB of the 4 KB that a kernel's arguments may take, so no copy and no wait
constexpr int64_t kMatricesPerLaunch = 128;

struct RowTable {
  void* data[kMatricesPerLaunch];
  int64_t width[kMatricesPerLaunch];
  // rows[stop[m - 1]] .. rows[stop[m] - 1] belong to matrix m
  int64_t stop[kMatricesPerLaunch];
  int64_t matrices;
};

// one row, shared by `lanes` threads: 16 bytes at a time where the row starts on such a border, then what is left
template <typename T>
FASTMEM_HOST_DEVICE void scale_row(T* row, int64_t width, typename Wide<T>::type factor, int64_t lane, int64_t lanes) {
  using W = typename Wide<T>::type;
  constexpr int64_t kPack = 16 / sizeof(T);
  struct alignas(16) Pack {
    T value[kPack];
  };
  const int64_t packs = reinterpret_cast<uintptr_t>(row) % 16 == 0 ? width / kPack : 0;
  Pack* packed = reinterpret_cast<Pack*>(row);
  for (int64_t i = lane; i < packs; i += lanes) {
    Pack pack = packed[i];
    for (int64_t j = 0; j < kPack; ++j) {
      pack.value[j] = static_cast<T>(static_cast<W>(pack.value[j]) * factor);
    }
    packed[i] = pack;
  }
  for (int64_t i = packs * kPack + lane; i < width; i += lanes) {
    row[i] = static_cast<T>(static_cast<W>(row[i]) * factor);
  }
}

// row number `item` of the table, whichever matrix it belongs to
template <typename T>
FASTMEM_HOST_DEVICE void scale_item(
    const RowTable& table,
    const int64_t* rows,
    int64_t item,
    typename Wide<T>::type factor,
    int64_t lane,
    int64_t lanes) {
  int64_t matrix = 0;
  while (item >= table.stop[matrix]) {
    ++matrix;
  }
  const int64_t width = table.width[matrix];
  scale_row(static_cast<T*>(table.data[matrix]) + rows[item] * width, width, factor, lane, lanes);
}

} // namespace fastmem
