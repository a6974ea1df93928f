// SPDX-License-Identifier: Apache-2.0
// Eight columns of a matrix at a time, whatever its strides.
#pragma once

#include "core/cuda/launch.cuh"
#include "core/dtype.h"

namespace pkt {

// Eight consecutive elements, moved by 16-byte loads.
template <typename T>
struct __align__(16) Eight {
  T values[8];
};

template <typename T>
struct Operand {
  const T* data;
  int64_t row_stride, col_stride, cols;
  bool wide;  // rows are contiguous and start at multiples of 16 bytes

  Operand(const void* values, int64_t rows_apart, int64_t cols_apart, int64_t count)
      : data(static_cast<const T*>(values)),
        row_stride(rows_apart),
        col_stride(cols_apart),
        cols(count),
        wide(cols_apart == 1 && rows_apart * int64_t{sizeof(T)} % 16 == 0 &&
             reinterpret_cast<uintptr_t>(values) % 16 == 0) {}

  // Zeros outside the matrix.
  __device__ __forceinline__ Eight<T> load(int64_t row, bool inside, int64_t col) const {
    const T* from = data + row * row_stride + col * col_stride;
    if (wide && inside && col + 8 <= cols) return *reinterpret_cast<const Eight<T>*>(from);
    Eight<T> out;
    for (int i = 0; i < 8; ++i) {
      out.values[i] = inside && col + i < cols ? from[i * col_stride] : T{};
    }
    return out;
  }
};

}  // namespace pkt
