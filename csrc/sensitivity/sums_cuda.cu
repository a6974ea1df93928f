// SPDX-License-Identifier: Apache-2.0
// The slots of a call's partial sums, added in ascending order. A thread adds one row's or one
// column's; one block adds the total's. Bound: latency of as many loads as a sum has slots.
#include "sensitivity/epilogue.cuh"

namespace pkt {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ double sum_of(const double* slots, int64_t first, int64_t end,
                                         int64_t stride) {
  double sum = 0.0;
#pragma unroll 8
  for (int64_t slot = first; slot < end; slot += stride) sum += slots[slot];
  return sum;
}

__global__ void __launch_bounds__(kThreads) add_slots(Outputs out) {
  const SumSlots& slots = out.slots;
  const int64_t row_blocks = out.sums.rows ? cuda::ceil_div(out.rows, kThreads) : 0;
  const int64_t col_blocks = out.sums.cols ? cuda::ceil_div(out.cols, kThreads) : 0;
  if (blockIdx.x < row_blocks) {
    const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (row >= out.rows) return;
    out.sums.rows[row] += sum_of(slots.rows, row, slots.row_slots * out.rows, out.rows);
  } else if (blockIdx.x < row_blocks + col_blocks) {
    const int64_t col = (blockIdx.x - row_blocks) * kThreads + threadIdx.x;
    if (col >= out.cols) return;
    out.sums.cols[col] += sum_of(slots.cols, col, slots.col_slots * out.cols, out.cols);
  } else {
    double* shared = cuda::shared_memory<double>();
    shared[threadIdx.x] = sum_of(slots.totals, threadIdx.x, slots.total_slots, kThreads);
    __syncthreads();
    if (threadIdx.x == 0) *out.sums.total += sum_of(shared, 0, kThreads, 1);
  }
}

}  // namespace

void add_slots_cuda(const Outputs& out, void* stream) {
  const int64_t blocks = (out.sums.rows ? cuda::ceil_div(out.rows, kThreads) : 0) +
                         (out.sums.cols ? cuda::ceil_div(out.cols, kThreads) : 0) +
                         (out.sums.total ? 1 : 0);
  if (blocks == 0) return;
  cuda::launch(add_slots, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
               kThreads * sizeof(double), static_cast<cudaStream_t>(stream), out);
}

}  // namespace pkt
