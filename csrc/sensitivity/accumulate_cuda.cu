// SPDX-License-Identifier: Apache-2.0
// score += |weight * grad| on the GPU.
//
//   add_flat   all is contiguous, and of the sums at most the total is asked for. A thread has two
//              runs of eight elements, all their 16-byte loads in flight at once.
//   add_tiles  everything else. A block has 64 x 128 elements, a thread four runs of four in each
//              strip: a transposed operand's lines stay in the L1 until the rows that share them
//              have used them.
// Bound: memory, 8 bytes of score and the operands an element. One launch a tensor: a table of
// tensors would save nothing at the sizes where the time goes.
#include <cmath>

#include "core/cuda/reduce.cuh"
#include "sensitivity/epilogue.cuh"
#include "sensitivity/operand.cuh"

namespace pkt {
namespace {

constexpr int kThreads = 256;
constexpr int kRuns = 2;                     // of eight elements, in a thread of add_flat
constexpr int kFlat = kThreads * 8 * kRuns;  // elements of a block
constexpr int kTileCols = 2 * kSumBlock;

template <typename W, typename G>
__global__ void __launch_bounds__(kThreads)
    add_flat(Outputs out, const W* weight, const G* grad, int64_t count) {
  const int64_t first = int64_t{blockIdx.x} * kFlat + threadIdx.x * 8;
  Eight<W> w[kRuns] = {};
  Eight<G> g[kRuns] = {};
  Eight<float> s[kRuns] = {};
#pragma unroll
  for (int n = 0; n < kRuns; ++n) {
    const int64_t at = first + n * kThreads * 8;
    if (at + 8 <= count) {
      w[n] = *reinterpret_cast<const Eight<W>*>(weight + at);
      g[n] = *reinterpret_cast<const Eight<G>*>(grad + at);
      if (out.score) s[n] = *reinterpret_cast<const Eight<float>*>(out.score + at);
    } else {
      for (int i = 0; i < 8; ++i) {
        if (at + i >= count) continue;
        w[n].values[i] = weight[at + i];
        g[n].values[i] = grad[at + i];
        if (out.score) s[n].values[i] = out.score[at + i];
      }
    }
  }
  bool special = false;
  double total = 0.0;
#pragma unroll
  for (int n = 0; n < kRuns; ++n) {
    const int64_t at = first + n * kThreads * 8;
    for (int i = 0; i < 8; ++i) {
      const float c = fabsf(to_float(w[n].values[i]) * to_float(g[n].values[i]));
      s[n].values[i] += c;
      special |= is_special(s[n].values[i]);
      if (out.sums.total) total += static_cast<double>(c);
    }
    if (!out.score) continue;
    if (at + 8 <= count) {
      *reinterpret_cast<Eight<float>*>(out.score + at) = s[n];
    } else {
      for (int i = 0; i < 8; ++i) {
        if (at + i < count) out.score[at + i] = s[n].values[i];
      }
    }
  }
  if (special && out.sums.nonfinite) *out.sums.nonfinite = 1;
  if (!out.sums.total) return;
  double* warps = cuda::shared_memory<double>();
  total = cuda::warp_sum(total);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < kThreads / 32; ++warp) total += warps[warp];
  out.slots.totals[blockIdx.x] = total;
}

using Sums = TileSums<kTileCols, kThreads, kSumBlock>;

template <typename W, typename G>
struct Products {
  const Outputs& out;
  const Matrix& weight;
  const Matrix& grad;

  __device__ __forceinline__ bool wide() const { return weight.wide && grad.wide; }

  template <bool kRagged, int kCount>
  __device__ __forceinline__ void contributions(float (&c)[kCount][4], int64_t row,
                                                int64_t col) const {
    float g[kCount][4];
    load_steps<W, Sums::kGroups, kRagged>(c, weight, row, col, out.rows, out.cols);
    load_steps<G, Sums::kGroups, kRagged>(g, grad, row, col, out.rows, out.cols);
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      for (int k = 0; k < 4; ++k) c[n][k] = fabsf(c[n][k] * g[n][k]);
    }
  }
};

template <typename W, typename G>
__global__ void __launch_bounds__(kThreads) add_tiles(Outputs out, Matrix weight, Matrix grad) {
  const int64_t across = cuda::ceil_div(out.cols, kTileCols);
  const int64_t tile_row = blockIdx.x / across, tile_col = blockIdx.x % across;
  Sums sums{out, cuda::shared_memory<double>(), static_cast<int>(threadIdx.x)};
  sums.add(tile_row * kSumBlock, tile_col * kTileCols, tile_col, Products<W, G>{out, weight, grad},
           [] { __syncthreads(); });
  sums.finish();
}

bool is_flat(const AccumulateSensitivityParams& p) {
  const auto plain = [&p](const void* data, int64_t row_stride, int64_t col_stride) {
    return (col_stride == 1 || p.cols == 1) && (row_stride == p.cols || p.rows == 1) &&
           reinterpret_cast<uintptr_t>(data) % 16 == 0;
  };
  return !p.sums.rows && !p.sums.cols && !p.sums.blocks &&
         plain(p.weight, p.weight_row_stride, p.weight_col_stride) &&
         plain(p.grad, p.grad_row_stride, p.grad_col_stride) && plain(p.score, p.cols, 1);
}

Outputs outputs_of(const AccumulateSensitivityParams& p) {
  Outputs out(p.score, p.rows, p.cols, p.sums, kTileCols, p.workspace);
  if (is_flat(p)) {
    out.slots =
        SumSlots(p.sums, p.rows, p.cols, 0, 0, cuda::ceil_div(p.rows * p.cols, kFlat), p.workspace);
  }
  return out;
}

template <typename W, typename G>
void launch_all(const AccumulateSensitivityParams& p, cudaStream_t stream) {
  const Outputs out = outputs_of(p);
  if (is_flat(p)) {
    const int64_t count = p.rows * p.cols;
    cuda::launch(add_flat<W, G>, dim3(static_cast<unsigned>(cuda::ceil_div(count, kFlat))),
                 dim3(kThreads), kThreads / 32 * sizeof(double), stream, out,
                 static_cast<const W*>(p.weight), static_cast<const G*>(p.grad), count);
  } else {
    const int64_t tiles = cuda::ceil_div(p.rows, kSumBlock) * cuda::ceil_div(p.cols, kTileCols);
    cuda::launch(add_tiles<W, G>, dim3(static_cast<unsigned>(tiles)), dim3(kThreads), Sums::kShared,
                 stream, out,
                 Matrix(p.weight, p.weight_dtype, p.weight_row_stride, p.weight_col_stride),
                 Matrix(p.grad, p.grad_dtype, p.grad_row_stride, p.grad_col_stride));
  }
  add_slots_cuda(out, stream);
}

}  // namespace

int64_t accumulate_sensitivity_workspace_cuda(const AccumulateSensitivityParams& p) {
  return outputs_of(p).slots.bytes;
}

void accumulate_sensitivity_cuda(const AccumulateSensitivityParams& p, void* stream) {
  with_float_type(p.weight_dtype, [&](auto weight) {
    with_float_type(p.grad_dtype, [&](auto grad) {
      launch_all<decltype(weight), decltype(grad)>(p, static_cast<cudaStream_t>(stream));
    });
  });
}

}  // namespace pkt
