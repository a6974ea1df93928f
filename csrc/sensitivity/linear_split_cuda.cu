// SPDX-License-Identifier: Apache-2.0
// Sensitivity of a linear layer's weight on the tensor cores, for float32 operands as sums of two
// bfloat16, and for float16 and bfloat16 operands whose layout linear_mma_cuda.cu does not take.
//
// The tile and the cut of the k loop are those of linear_mma_cuda.cu. A step is 16 rows; a thread
// loads eight values of either operand, in flight while the step before is multiplied, splits them
// on their way into shared memory and leaves them there as panels; two stages, one barrier a step.
//   x = high + low, both bfloat16: |x - high| <= 2^-8 |x|, |x - high - low| <= 2^-17 |x|. A product
//   is high high + high low + low high, so what is left out is at most 2^-15 of |d| |x| (2^-16 from
//   low low, twice 2^-17 from the rounding of low): |gradient| is off by no more than
//   2^-15 sum |d| |x| (for normal values and 200 rows the median is 2^-21 of it), and the float32
//   rounding of the sums. Below 2^-110, where low is subnormal, 2^-134 takes the place of the
//   2^-17 |x|.
//
//   high is the value nearest to x that bfloat16 has, at most its largest one: a float32 beyond it
//   does not become infinite, and an infinity or NaN is the low part's, where it does what it does
//   in float32 (infinity times zero is NaN), if no finite product overflows.
//
//   Bound (computed, no card has timed it): tensor cores, 3 products; 64 KB of shared memory
//   written and read for 16 rows, 512 cycles to 768 on sm_80. Float32 crosses the L2 cache once,
//   against 1.5 times for panels split beforehand and joined along k.
// Dropped: splitting into a workspace first, which takes as much memory as the operands.
#include "sensitivity/mma_tile.cuh"
#include "sensitivity/operand.cuh"

namespace pkt {
namespace {

using namespace mma_tile;

constexpr int kDepth = 16;
constexpr int kPanel = kDepth * kRowBytes;

// How a type goes into panels of 16-bit values.
template <typename T>
struct Panels {
  using Element = T;
  static constexpr int kParts = 1;

  static __device__ __forceinline__ void store(char* to, const Eight<T>& from) {
    *reinterpret_cast<Eight<T>*>(to) = from;
  }
};

template <>
struct Panels<float> {
  using Element = bfloat16;
  static constexpr int kParts = 2;  // high, low

  static __device__ __forceinline__ void store(char* to, const Eight<float>& from) {
    uint32_t high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float a = from.values[2 * i], b = from.values[2 * i + 1];
      high[i] = cuda::pack_bfloat16(within_bfloat16(a), within_bfloat16(b));
      low[i] = cuda::pack_bfloat16(a - bits_to_float(high[i] << 16),
                                   b - bits_to_float(high[i] & 0xffff0000u));
    }
    *reinterpret_cast<uint4*>(to) = uint4{high[0], high[1], high[2], high[3]};
    *reinterpret_cast<uint4*>(to + kPanel) = uint4{low[0], low[1], low[2], low[3]};
  }

 private:
  static __device__ __forceinline__ float within_bfloat16(float value) {
    constexpr float kLargest = 0x1.fep127f;
    return fminf(fmaxf(value, -kLargest), kLargest);
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    multiply_split(LinearSensitivityParams p, Operand<T> grads, Operand<T> inputs, Outputs out,
                   Matrix weight) {
  using P = Panels<T>;
  constexpr int kOperand = P::kParts * kPanel;
  constexpr int kStage = 2 * kOperand;  // grad_outputs, then inputs
  char* const shared = cuda::shared_memory<char>();
  const int thread = static_cast<int>(threadIdx.x);
  const Warp warp(thread);
  const TilePlace tile(blockIdx.x, cuda::ceil_div(p.out_features, kTile),
                       cuda::ceil_div(p.in_features, kTile));

  const int own = thread / 16, chunk = thread % 16;  // a thread's row of the step and columns
  Steps<kDepth> steps(p);
  Eight<T> grad, input;
  const auto load = [&] {
    const bool inside = own < steps.left;
    grad = grads.load(int64_t{steps.row} + own, inside, tile.row * kTile + chunk * 8);
    input = inputs.load(int64_t{steps.row} + own, inside, tile.col * kTile + chunk * 8);
  };
  const auto store = [&](char* stage) {
    P::store(stage + panel_offset(own, chunk), grad);
    P::store(stage + kOperand + panel_offset(own, chunk), input);
  };

  Sums acc, sum;
  acc.clear();
  sum.clear();
  bool more = steps.left > 0;
  if (more) {
    load();
    store(shared);
  }
  __syncthreads();
#pragma unroll 1
  for (int parity = 0; more; parity ^= 1) {
    const bool last_of_segment = steps.last_of_segment();
    steps.advance();
    more = steps.left > 0;
    if (more) load();

    const char* stage = shared + parity * kStage;
    Fragments high;
    warp.load_grads(high.grads, stage, 0);
    warp.load_inputs(high.inputs, stage + kOperand, 0);
    acc.multiply_add<typename P::Element>(high.grads, high.inputs);
    if constexpr (P::kParts == 2) {
      Fragments low;
      warp.load_inputs(low.inputs, stage + kOperand + kPanel, 0);
      acc.multiply_add<typename P::Element>(high.grads, low.inputs);
      warp.load_grads(low.grads, stage + kPanel, 0);
      acc.multiply_add<typename P::Element>(low.grads, high.inputs);
    }
    if (last_of_segment) sum.flush(acc);

    if (more) store(shared + (parity ^ 1) * kStage);
    __syncthreads();
  }

  End::run(
      out, weight, tile.row, tile.col, thread, shared,
      [&](const auto& put) { sum.visit(warp, put); }, [] { __syncthreads(); });
}

}  // namespace

void linear_split_cuda(const LinearSensitivityParams& p, void* stream) {
  const int64_t tiles =
      cuda::ceil_div(p.out_features, kTile) * cuda::ceil_div(p.in_features, kTile);
  const Outputs out(p.score, p.out_features, p.in_features, p.sums, kTile, p.workspace);
  const Matrix weight(p.weight, p.weight_dtype, p.weight_row_stride, p.weight_col_stride);
  with_float_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr size_t kStages = 2 * 2 * Panels<T>::kParts * kPanel;
    cuda::launch(
        multiply_split<T>, dim3(static_cast<unsigned>(tiles)), dim3(kThreads),
        End::kShared > kStages ? End::kShared : kStages, static_cast<cudaStream_t>(stream), p,
        Operand<T>(p.grad_outputs, p.grads_row_stride, p.grads_col_stride, p.out_features),
        Operand<T>(p.inputs, p.inputs_row_stride, p.inputs_col_stride, p.in_features), out, weight);
  });
  add_slots_cuda(out, stream);
}

}  // namespace pkt
