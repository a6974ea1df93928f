// SPDX-License-Identifier: Apache-2.0
// Sensitivity of a linear layer's weight on the GPU, in float32 FMAs for every storage type.
//
// linear_tiles: a block owns a tile of scores and a thread 8 x 8 of them, in two register tiles:
//   acc is the running sample's gradient, sum the magnitudes of those before. The block walks the
//   rows of all segments in steps, double-buffered through shared memory: one barrier a step, the
//   next step's loads in flight during the multiplications. A step never crosses a boundary: its
//   tail is zero. At a boundary sum += |acc|; the rest is in epilogue.cuh. Rows and segments in
//   ascending order: equal bits in every run. Bound: float32 FMA throughput (64 FMAs per 16 values
//   read from shared memory).
#include <algorithm>

#include "core/cuda/launch.cuh"
#include "sensitivity/epilogue.cuh"
#include "sensitivity/linear_cuda.h"
#include "sensitivity/operand.cuh"

namespace pkt {
namespace {

using cuda::ceil_div;

template <int kTileSide>
struct Shape {
  static constexpr int kTile = kTileSide;  // scores per side of a block's tile
  static constexpr int kSide = kTile / 8;  // threads per side
  static constexpr int kThreads = kSide * kSide;
  static constexpr int kDepth = kSide;           // rows a step
  static constexpr int kPanel = kDepth * kTile;  // float32 values of one operand's step
  static constexpr int kStage = 2 * kPanel;      // grad_outputs, then inputs
  // the smaller tile has blocks enough in flight with half the loads and fewer registers
  using End = TileEnd<kTile, kTile, kThreads, kTile == 64 ? 8 : 64>;
  static constexpr size_t kShared = std::max(2 * kStage * sizeof(float), End::kShared);
  static_assert(kThreads * 8 == kPanel, "a thread loads eight values of either operand a step");
};

template <typename T>
__device__ __forceinline__ void store_shared(float* out, const Eight<T>& from) {
  for (int i = 0; i < 8; i += 4) {
    *reinterpret_cast<float4*>(out + i) =
        float4{to_float(from.values[i]), to_float(from.values[i + 1]), to_float(from.values[i + 2]),
               to_float(from.values[i + 3])};
  }
}

// Where a block stands: `row` of `segment`, which ends before row `end`.
struct Cursor {
  int64_t segment = -1, row = 0, end = 0;

  // To the next step of `depth` rows; segment == segment_count when there is none.
  __device__ __forceinline__ void advance(const LinearSensitivityParams& p, int depth) {
    row += depth;
    while (row >= end && ++segment < p.segment_count) {
      row = p.segments[segment] > 0 ? p.segments[segment] : 0;
      end = p.segments[segment + 1] < p.rows ? p.segments[segment + 1] : p.rows;
    }
  }
};

// The place in a tile of a thread's i-th row or column of eight: two runs of four, half a tile
// apart, so that a warp's 16-byte reads of shared memory meet no bank twice.
template <int kTile>
__device__ __forceinline__ int place(int thread, int i) {
  return i / 4 * (kTile / 2) + thread * 4 + i % 4;
}

template <int kTile>
__device__ __forceinline__ void multiply_add(float (&acc)[8][8], const float* stage, int ty,
                                             int tx) {
  using S = Shape<kTile>;
#pragma unroll 4
  for (int k = 0; k < S::kDepth; ++k) {
    float d[8], x[8];
    for (int i = 0; i < 8; i += 4) {
      const float* grads = stage + k * kTile;
      const float4 four_d = *reinterpret_cast<const float4*>(grads + place<kTile>(ty, i));
      const float4 four_x =
          *reinterpret_cast<const float4*>(grads + S::kPanel + place<kTile>(tx, i));
      d[i] = four_d.x, d[i + 1] = four_d.y, d[i + 2] = four_d.z, d[i + 3] = four_d.w;
      x[i] = four_x.x, x[i + 1] = four_x.y, x[i + 2] = four_x.z, x[i + 3] = four_x.w;
    }
    for (int i = 0; i < 8; ++i) {
      for (int j = 0; j < 8; ++j) acc[i][j] += d[i] * x[j];
    }
  }
}

template <typename T, int kTile>
__global__ void __launch_bounds__(Shape<kTile>::kThreads)
    linear_tiles(LinearSensitivityParams p, Operand<T> grads, Operand<T> inputs, Matrix weight,
                 Outputs out) {
  using S = Shape<kTile>;
  float* shared = cuda::shared_memory<float>();
  const int tx = threadIdx.x % S::kSide;
  const int ty = threadIdx.x / S::kSide;
  const int64_t top = int64_t{blockIdx.y} * kTile;
  const int64_t left = int64_t{blockIdx.x} * kTile;

  float acc[8][8] = {};
  float sum[8][8] = {};
  Eight<T> next_grads, next_inputs;
  const auto load = [&](const Cursor& at) {  // row ty of the step, columns 8 tx and following
    const bool inside = at.row + ty < at.end;
    next_grads = grads.load(at.row + ty, inside, top + tx * 8);
    next_inputs = inputs.load(at.row + ty, inside, left + tx * 8);
  };
  const auto store = [&](float* stage) {
    store_shared(stage + ty * kTile + tx * 8, next_grads);
    store_shared(stage + S::kPanel + ty * kTile + tx * 8, next_inputs);
  };

  Cursor now;
  now.advance(p, S::kDepth);
  if (now.segment < p.segment_count) {
    load(now);
    store(shared);
  }
  __syncthreads();
  for (int parity = 0; now.segment < p.segment_count; parity ^= 1) {
    Cursor next = now;
    next.advance(p, S::kDepth);
    const bool more = next.segment < p.segment_count;
    if (more) load(next);
    multiply_add<kTile>(acc, shared + parity * S::kStage, ty, tx);
    if (next.segment != now.segment) {
      for (int i = 0; i < 8; ++i) {
        for (int j = 0; j < 8; ++j) {
          sum[i][j] += fabsf(acc[i][j]);
          acc[i][j] = 0.0f;
        }
      }
    }
    if (more) store(shared + (parity ^ 1) * S::kStage);
    __syncthreads();
    now = next;
  }

  S::End::run(
      out, weight, blockIdx.y, blockIdx.x, threadIdx.x, shared,
      [&](const auto& put) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
          for (int j = 0; j < 8; ++j) put(place<kTile>(ty, i), place<kTile>(tx, j), sum[i][j]);
        }
      },
      [] { __syncthreads(); });
}

template <typename T, int kTile>
void launch_tiles(const LinearSensitivityParams& p, cudaStream_t stream) {
  using S = Shape<kTile>;
  const Outputs out(p.score, p.out_features, p.in_features, p.sums, kTile, p.workspace);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.in_features, kTile)),
                  static_cast<unsigned>(ceil_div(p.out_features, kTile)));
  cuda::launch(linear_tiles<T, kTile>, grid, dim3(S::kThreads), S::kShared, stream, p,
               Operand<T>(p.grad_outputs, p.grads_row_stride, p.grads_col_stride, p.out_features),
               Operand<T>(p.inputs, p.inputs_row_stride, p.inputs_col_stride, p.in_features),
               Matrix(p.weight, p.weight_dtype, p.weight_row_stride, p.weight_col_stride), out);
  add_slots_cuda(out, stream);
}

}  // namespace

void linear_fma_cuda(const LinearSensitivityParams& p, bool wide, void* stream) {
  with_float_type(p.dtype, [&](auto value) {
    using T = decltype(value);
    const auto on = static_cast<cudaStream_t>(stream);
    return wide ? launch_tiles<T, 128>(p, on) : launch_tiles<T, 64>(p, on);
  });
}

}  // namespace pkt
