// SPDX-License-Identifier: Apache-2.0
#include <stdexcept>
#include <utility>

#include "core/cuda/hopper.cuh"
#include "core/cuda/load.cuh"
#include "core/cuda/mma.cuh"
#include "planted.h"

namespace planted {
namespace {

constexpr int kTile = 64;

__global__ void reverse(const float* values, float* out, int64_t count, Fault fault) {
  float* tile = pkt::cuda::shared_memory<float>();
  const int64_t base = int64_t{blockIdx.x} * kTile;
  const int64_t left = count - base;
  const int size = static_cast<int>(left < kTile ? left : kTile);
  const int used = fault == Fault::tail_off_by_one ? size - 1 : size;
  const int i = static_cast<int>(threadIdx.x);
  if (i < used) {
    tile[i] = values[base + i];
  } else if (fault == Fault::out_of_range_read) {
    tile[i] = values[base + i];
  }
  if (fault == Fault::partial_barrier) {
    if (i < kTile / 2) __syncthreads();
  } else if (fault != Fault::missing_barrier) {
    __syncthreads();
  }
  float sum = i < size ? 1.0f : 0.0f;
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (i < used) out[base + i] = tile[size - 1 - i] + 0.0f * sum;
}

// Two warps, each with eight columns of out. A step is 16 rows of a and of b, one 16-byte copy a
// thread; the steps take turns in two stages of shared memory.
template <typename T>
__global__ void product(const T* a, const T* b, float* out, bool transposed, Fault fault) {
  constexpr int kSide = 16, kStage = 2 * kSide * kSide;
  T* shared = pkt::cuda::shared_memory<T>();
  const int thread = static_cast<int>(threadIdx.x);
  const auto copy = [&](int step, int stage) {
    const T* from = (thread < 32 ? a : b) + step * kSide * kSide + thread % 32 * 8;
    pkt::cuda::copy_async_16(shared + stage * kStage + thread * 8, from, 16);
    pkt::cuda::copy_async_commit();
  };
  copy(0, 0);
  if (fault != Fault::early_copy) copy(1, 1);
  const int lane = thread % 32;
  const int warp = thread / 32;
  float c[4] = {};
  for (int step = 0; step < 2; ++step) {
    if (step == 1) {
      if (fault != Fault::abandoned_copy) pkt::cuda::copy_async_wait<0>();
    } else if (fault == Fault::short_wait) {
      pkt::cuda::copy_async_wait<2>();
    } else if (fault == Fault::early_copy) {
      pkt::cuda::copy_async_wait<0>();
    } else if (fault != Fault::missing_wait) {
      pkt::cuda::copy_async_wait<1>();
    }
    if (fault != Fault::missing_barrier) __syncthreads();
    if (fault == Fault::early_copy && step == 0) copy(1, 0);  // over what is about to be read
    const T* stage = shared + (fault == Fault::early_copy ? 0 : step) * kStage;
    const int row = lane % 8, second = lane / 8 % 2 * 8, third = lane / 16 * 8;
    uint32_t left[4], right[4];
    if (transposed) {
      pkt::cuda::ldmatrix_x4<true>(left, stage + (row + third) * kSide + second);
    } else {
      pkt::cuda::ldmatrix_x4<false>(left, stage + (row + second) * kSide + third);
    }
    if (fault == Fault::divergent_warp && lane == 5) __syncwarp();
    if (fault == Fault::swapped_fragments) std::swap(left[1], left[2]);
    pkt::cuda::ldmatrix_x4<true>(right, stage + kSide * kSide + (row + second) * kSide + third);
    const uint32_t half[2] = {right[2 * warp], right[2 * warp + 1]};
    pkt::cuda::mma_m16n8k16<T>(c, left, half);
  }
  for (int i = 0; i < 4; ++i) {
    out[(lane / 4 + i / 2 * 8) * kSide + warp * 8 + lane % 4 * 2 + i % 2] += c[i];
  }
}

template <typename T>
__global__ void box_product(const __grid_constant__ pkt::cuda::TensorMap a,
                            const __grid_constant__ pkt::cuda::TensorMap b, float* out,
                            Fault fault) {
  constexpr int kBox = 16 * 128;
  char* shared = pkt::cuda::shared_memory<char>();
  auto* barrier = reinterpret_cast<pkt::cuda::Barrier*>(shared + 4 * kBox);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    pkt::cuda::barrier_init(barrier, 1);
    pkt::cuda::barrier_init_done();
    pkt::cuda::barrier_arrive_expecting(barrier,
                                        4 * kBox + (fault == Fault::endless_barrier ? 16 : 0));
    pkt::cuda::copy_box(shared, a, 0, 0, barrier);
    for (int i = 0; i < 3; ++i) {
      pkt::cuda::copy_box(shared + (1 + i) * kBox, b, i * 64, 0, barrier);
    }
  }
  __syncthreads();
  if (fault != Fault::box_not_waited) pkt::cuda::barrier_wait(barrier, 0);
  float sums[96];
  pkt::cuda::wgmma_fence();
  pkt::cuda::wgmma_m64n192k16<T>(
      sums, pkt::cuda::columns_descriptor(shared, kBox),
      pkt::cuda::columns_descriptor(shared + kBox, fault == Fault::wrong_descriptor ? 1024 : kBox),
      false);
  pkt::cuda::wgmma_commit();
  if (fault != Fault::sums_not_waited) pkt::cuda::wgmma_wait_all();
  for (int i = 0; i < 96; ++i) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
    out[row * 192 + i / 4 * 8 + thread % 4 * 2 + i % 2] = sums[i];
  }
}

}  // namespace

Fault fault_of(const std::string& name) {
  if (name == "none") return Fault::none;
  if (name == "missing_barrier") return Fault::missing_barrier;
  if (name == "tail_off_by_one") return Fault::tail_off_by_one;
  if (name == "out_of_range_read") return Fault::out_of_range_read;
  if (name == "partial_barrier") return Fault::partial_barrier;
  if (name == "missing_wait") return Fault::missing_wait;
  if (name == "short_wait") return Fault::short_wait;
  if (name == "abandoned_copy") return Fault::abandoned_copy;
  if (name == "early_copy") return Fault::early_copy;
  if (name == "swapped_fragments") return Fault::swapped_fragments;
  if (name == "divergent_warp") return Fault::divergent_warp;
  if (name == "box_not_waited") return Fault::box_not_waited;
  if (name == "sums_not_waited") return Fault::sums_not_waited;
  if (name == "endless_barrier") return Fault::endless_barrier;
  if (name == "wrong_descriptor") return Fault::wrong_descriptor;
  throw std::invalid_argument("unknown fault " + name);
}

void reverse_tiles(const float* values, float* out, int64_t count, Fault fault) {
  if (count == 0) return;
  pkt::cuda::launch(reverse, dim3(static_cast<unsigned>(pkt::cuda::ceil_div(count, kTile))),
                    dim3(kTile), kTile * sizeof(float), nullptr, values, out, count, fault);
}

template <typename T>
void multiply(const T* a, const T* b, float* out, bool transposed, Fault fault) {
  pkt::cuda::launch(product<T>, dim3(1), dim3(64), 4 * 256 * sizeof(T), nullptr, a, b, out,
                    transposed, fault);
}
template void multiply(const pkt::half*, const pkt::half*, float*, bool, Fault);
template void multiply(const pkt::bfloat16*, const pkt::bfloat16*, float*, bool, Fault);

template <typename T>
void multiply_boxes(const T* a, const T* b, float* out, Fault fault) {
  pkt::cuda::launch(box_product<T>, dim3(1), dim3(128), 4 * 16 * 128 + 8, nullptr,
                    pkt::cuda::tensor_map(a, 16, 64, 128, 16),
                    pkt::cuda::tensor_map(b, 16, 192, 384, 16), out, fault);
}
template void multiply_boxes(const pkt::half*, const pkt::half*, float*, Fault);
template void multiply_boxes(const pkt::bfloat16*, const pkt::bfloat16*, float*, Fault);

}  // namespace planted
