// SPDX-License-Identifier: Apache-2.0
// score += |weight * grad| on the GPU.
//
// add_products: eight elements a thread, 16-byte loads. Bound: 8 bytes of score and the operands.
// add_products_strided: 32 x 32 elements a block, so that a transposed operand's lines stay in L1.
#include <cmath>

#include "core/cuda/launch.cuh"
#include "sensitivity/sums.h"

namespace pkt {
namespace {

using cuda::ceil_div;

// Eight consecutive elements, moved by 16-byte loads.
template <typename T>
struct __align__(16) Eight {
  T values[8];
};

__device__ __forceinline__ float load_as_float(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[i];
  if (dtype == DType::f16) return to_float(static_cast<const half*>(data)[i]);
  return to_float(static_cast<const bfloat16*>(data)[i]);
}

constexpr int kThreads = 256;

template <typename W, typename G>
__global__ void __launch_bounds__(kThreads)
    add_products(float* score, const W* weight, const G* grad, int64_t count) {
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * 8;
  if (first + 8 <= count) {
    const auto w = *reinterpret_cast<const Eight<W>*>(weight + first);
    const auto g = *reinterpret_cast<const Eight<G>*>(grad + first);
    auto s = *reinterpret_cast<Eight<float>*>(score + first);
    for (int i = 0; i < 8; ++i) s.values[i] += fabsf(to_float(w.values[i]) * to_float(g.values[i]));
    *reinterpret_cast<Eight<float>*>(score + first) = s;
  } else {
    for (int64_t i = first; i < count; ++i) {
      score[i] += fabsf(to_float(weight[i]) * to_float(grad[i]));
    }
  }
}

constexpr int kSquare = 32;

__global__ void __launch_bounds__(kThreads) add_products_strided(AccumulateSensitivityParams p) {
  const int64_t across = ceil_div(p.cols, kSquare);
  const int64_t col = blockIdx.x % across * kSquare + threadIdx.x % kSquare;
  const int64_t top = blockIdx.x / across * kSquare;
  if (col >= p.cols) return;
  for (int i = threadIdx.x / kSquare; i < kSquare; i += kThreads / kSquare) {
    const int64_t row = top + i;
    if (row >= p.rows) return;
    const float weight = load_as_float(p.weight, p.weight_dtype,
                                       row * p.weight_row_stride + col * p.weight_col_stride);
    const float grad =
        load_as_float(p.grad, p.grad_dtype, row * p.grad_row_stride + col * p.grad_col_stride);
    p.score[row * p.cols + col] += fabsf(weight * grad);
  }
}

}  // namespace

int64_t accumulate_sensitivity_workspace_cuda(const AccumulateSensitivityParams& p) {
  return 0;
}

void accumulate_sensitivity_cuda(const AccumulateSensitivityParams& p, void* stream) {
  if (!p.score || p.sums.any_sum() || p.sums.nonfinite) {
    throw std::logic_error("sensitivity: sums are not formed on CUDA yet");
  }
  const auto on = static_cast<cudaStream_t>(stream);
  const auto plain = [&p](const void* data, int64_t row_stride, int64_t col_stride) {
    return (col_stride == 1 || p.cols == 1) && (row_stride == p.cols || p.rows == 1) &&
           reinterpret_cast<uintptr_t>(data) % 16 == 0;
  };
  if (plain(p.weight, p.weight_row_stride, p.weight_col_stride) &&
      plain(p.grad, p.grad_row_stride, p.grad_col_stride) && plain(p.score, p.cols, 1)) {
    const int64_t count = p.rows * p.cols;
    const dim3 grid(static_cast<unsigned>(ceil_div(count, kThreads * 8)));
    with_float_type(p.weight_dtype, [&](auto weight) {
      with_float_type(p.grad_dtype, [&](auto grad) {
        using W = decltype(weight);
        using G = decltype(grad);
        cuda::launch(add_products<W, G>, grid, dim3(kThreads), 0, on, p.score,
                     static_cast<const W*>(p.weight), static_cast<const G*>(p.grad), count);
      });
    });
  } else {
    const int64_t blocks = ceil_div(p.rows, kSquare) * ceil_div(p.cols, kSquare);
    cuda::launch(add_products_strided, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, on,
                 p);
  }
}

}  // namespace pkt
