// SPDX-License-Identifier: Apache-2.0
// Sums over a warp and a block in a fixed order: equal runs give equal bits.
#pragma once

#include "core/cuda/launch.cuh"

namespace pkt::cuda {

// Sum over the warp, in every lane.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int bit = 16; bit > 0; bit /= 2) value += __shfl_xor_sync(0xffffffffu, value, bit);
  return value;
}

// Maximum over the warp, in every lane; a NaN may get lost.
__device__ __forceinline__ float warp_max(float value) {
  for (int bit = 16; bit > 0; bit /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, value, bit);
    value = other > value ? other : value;
  }
  return value;
}

// Over a block of kThreads (a multiple of 32), in every thread, the warps in ascending order.
// `scratch` is kThreads / 32 values of shared memory, which are free again afterwards.
template <int kThreads>
__device__ __forceinline__ double block_sum(double value, double* scratch) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0.0;
  for (int warp = 0; warp < kThreads / 32; ++warp) total += scratch[warp];
  __syncthreads();
  return total;
}

template <int kThreads>
__device__ __forceinline__ float block_max(float value, float* scratch) {
  value = warp_max(value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  float top = scratch[0];
  for (int warp = 1; warp < kThreads / 32; ++warp) {
    top = scratch[warp] > top ? scratch[warp] : top;
  }
  __syncthreads();
  return top;
}

// Sum over the lanes up to this one.
__device__ __forceinline__ double warp_scan(double value, int lane) {
  for (int offset = 1; offset < 32; offset *= 2) {
    const double below = __shfl_up_sync(0xffffffffu, value, offset);
    if (lane >= offset) value += below;
  }
  return value;
}

// Over a block of kThreads (a multiple of 32): `prefix` becomes its sum over the threads before
// this one, `total` its sum over all. `scratch` is kThreads / 16 values of shared memory; there is
// one barrier, so two calls in a row need different ones.
template <int kThreads>
__device__ __forceinline__ void block_prefix_and_total(double& prefix, double& total,
                                                       double* scratch) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024, "whole warps, one block");
  constexpr int kWarps = kThreads / 32;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const double scanned = warp_scan(prefix, lane);
  const double summed = warp_sum(total);
  if (lane == 31) {
    scratch[warp] = scanned;
    scratch[kWarps + warp] = summed;
  }
  __syncthreads();
  const double before = __shfl_up_sync(0xffffffffu, scanned, 1);
  prefix = 0.0;
  total = 0.0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) prefix += scratch[w];
    total += scratch[kWarps + w];
  }
  if (lane > 0) prefix += before;
}

}  // namespace pkt::cuda
