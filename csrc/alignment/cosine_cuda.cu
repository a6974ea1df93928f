// SPDX-License-Identifier: Apache-2.0
// The cosine of hidden states to their targets, row by row, and its gradient, on the GPU.
//
// A block a row; neighbouring threads read neighbouring elements. Threads add in float32, at most a
// few dozen values each, and meet in float64 by shuffles and in the order of the warps: equal bits
// in every run. Bound: memory, both operands read once a pass.
#include "alignment/alignment.h"
#include "core/cuda/reduce.cuh"

namespace pkt {
namespace {

constexpr int kThreads = 256;

template <typename S, typename T>
__global__ void __launch_bounds__(kThreads) compare_rows(CosineRowsParams p) {
  const int64_t row = blockIdx.x;
  const S* const states = static_cast<const S*>(p.states) + row * p.state_stride;
  const T* const targets = static_cast<const T*>(p.targets) + row * p.target_stride;
  float dot = 0.0f, state = 0.0f, target = 0.0f;
  for (int64_t j = threadIdx.x; j < p.columns; j += kThreads) {
    const float s = to_float(states[j]), t = to_float(targets[j]);
    dot += s * t;
    state += s * s;
    target += t * t;
  }
  double* const scratch = cuda::shared_memory<double>();
  const double dots = cuda::block_sum<kThreads>(dot, scratch);
  const double state_square = cuda::block_sum<kThreads>(state, scratch);
  const double target_square = cuda::block_sum<kThreads>(target, scratch);
  if (threadIdx.x > 0) return;
  const Cosine found = cosine_of(dots, state_square, target_square);
  p.loss[row] = found.loss;
  p.factors[2 * row] = found.by_target;
  p.factors[2 * row + 1] = found.by_state;
}

template <typename S, typename T>
__global__ void __launch_bounds__(kThreads) steer_rows(CosineRowsBackwardParams q) {
  const CosineRowsParams& p = q.forward;
  const int64_t row = blockIdx.x;
  const S* const states = static_cast<const S*>(p.states) + row * p.state_stride;
  const T* const targets = static_cast<const T*>(p.targets) + row * p.target_stride;
  S* const out = static_cast<S*>(q.gradient) + row * p.columns;
  const float by_target = q.loss_gradient[row] * p.factors[2 * row];
  const float by_state = q.loss_gradient[row] * p.factors[2 * row + 1];
  for (int64_t j = threadIdx.x; j < p.columns; j += kThreads) {
    from_float(by_target * to_float(targets[j]) + by_state * to_float(states[j]), out[j]);
  }
}

// run(S{}, T{}) for the types of states and targets; a block a row.
template <typename Run>
void with_types(const CosineRowsParams& p, const Run& run) {
  if (p.rows >= int64_t{1} << 31) {
    throw std::invalid_argument("states: 2^31 rows and more exceed a grid");
  }
  with_float_type(p.state_dtype, [&](auto state) {
    with_float_type(p.target_dtype, [&](auto target) { run(state, target); });
  });
}

}  // namespace

void cosine_rows_cuda(const CosineRowsParams& p, void* stream) {
  with_types(p, [&](auto state, auto target) {
    cuda::launch(compare_rows<decltype(state), decltype(target)>,
                 dim3(static_cast<unsigned>(p.rows)), dim3(kThreads),
                 kThreads / 32 * sizeof(double), static_cast<cudaStream_t>(stream), p);
  });
}

void cosine_rows_backward_cuda(const CosineRowsBackwardParams& q, void* stream) {
  with_types(q.forward, [&](auto state, auto target) {
    cuda::launch(steer_rows<decltype(state), decltype(target)>,
                 dim3(static_cast<unsigned>(q.forward.rows)), dim3(kThreads), 0,
                 static_cast<cudaStream_t>(stream), q);
  });
}

}  // namespace pkt
