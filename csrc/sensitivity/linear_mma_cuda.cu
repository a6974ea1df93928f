// SPDX-License-Identifier: Apache-2.0
// Sensitivity of a linear layer's weight on the tensor cores (mma.sync, sm_80 and later), for
// float16 and bfloat16 operands whose rows are contiguous and start at multiples of 16 bytes.
//
// A block owns a tile of 128 x 128 scores (mma_tile.cuh) and walks the rows of all segments in
// steps of up to 32 that never cross a boundary, so the product is that of one long matrix whose
// k loop is cut: at a boundary sum += |acc|, and acc starts again. Steps are copied asynchronously,
// three ahead, into four stages of shared memory; what lies outside the matrix or the segment is
// zero, and the second half of a step of at most 16 rows is neither copied nor multiplied. The
// operands of the next 16 rows are read from shared memory while those before are multiplied: one
// barrier a step.
//   Who copies knows where segments end, who multiplies three steps later must: a queue of four
//   bits a step, in one register, tells. The loop over the stages is unrolled, which makes their
//   addresses constants: of 160 instructions a step and warp 32 multiply.
//   Bound (computed, no card has timed it): tensor cores; 24 KB of shared memory read for 16 rows,
//   192 cycles to 256 on sm_80. Occupancy: one block a multiprocessor, by its registers.
// Dropped: padded panel rows (70 KB; exchanging the chunks of a row costs one instruction a load);
// a loop over a stage that is a variable, and offsets of 64 bits (270 instructions a step, more
// than two warps a scheduler can issue beside 512 cycles of products).
#include "core/cuda/load.cuh"
#include "sensitivity/mma_tile.cuh"

namespace pkt {
namespace {

using namespace mma_tile;

constexpr int kDepth = 32, kStages = 4;
constexpr int kPanel = kDepth * kRowBytes;
constexpr int kStage = 2 * kPanel;  // grad_outputs, then inputs
constexpr size_t kShared = End::kShared > kStages* kStage ? End::kShared : size_t{kStages * kStage};

// A matrix [rows, cols] of 16-bit values, copied in chunks of 16 bytes.
struct Rows {
  const char* data;
  int64_t row_bytes, cols;

  // What a thread copies of a row: 16 bytes from column `col` on, fewer at the edge, or none.
  __device__ __forceinline__ int bytes_at(int64_t col) const {
    const int64_t left = cols - col;
    return left >= 8 ? 16 : left > 0 ? static_cast<int>(left) * 2 : 0;
  }
};

// What the multiplying side has to know of a step.
enum : unsigned { kExists = 1, kSecondHalf = 2, kLastOfSegment = 4, kBits = 4 };

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    multiply_segments(LinearSensitivityParams p, Rows grads, Rows inputs, Outputs out,
                      Matrix weight) {
  char* const shared = cuda::shared_memory<char>();
  const int thread = static_cast<int>(threadIdx.x);
  const Warp warp(thread);
  const TilePlace tile(blockIdx.x, cuda::ceil_div(p.out_features, kTile),
                       cuda::ceil_div(p.in_features, kTile));

  // A thread copies its chunk of the rows `own` and own + 16 of either operand.
  const int own = thread / 16, chunk = thread % 16;
  const int64_t row_of_tile = tile.row * kTile + chunk * 8,
                col_of_tile = tile.col * kTile + chunk * 8;
  const int grad_bytes = grads.bytes_at(row_of_tile), input_bytes = inputs.bytes_at(col_of_tile);
  const char* const grad_from =
      grads.data + own * grads.row_bytes + (grad_bytes ? row_of_tile * 2 : 0);
  const char* const input_from =
      inputs.data + own * inputs.row_bytes + (input_bytes ? col_of_tile * 2 : 0);
  char* const to = shared + panel_offset(own, chunk);

  Steps<kDepth> steps(p);
  const char *grad = nullptr, *input = nullptr;  // this thread's chunk of the step's first rows
  const auto find_rows = [&] {
    grad = grad_from + steps.row * grads.row_bytes;
    input = input_from + steps.row * inputs.row_bytes;
  };
  find_rows();
  const auto copy_next = [&](int slot) -> unsigned {
    unsigned step = 0;
    if (steps.left > 0) {
      char* stage = to + slot * kStage;
      cuda::copy_async_16(stage, grad, own < steps.left ? grad_bytes : 0);
      cuda::copy_async_16(stage + kPanel, input, own < steps.left ? input_bytes : 0);
      step = kExists | (steps.last_of_segment() ? kLastOfSegment : 0u);
      if (steps.left > 16) {
        const bool inside = own + 16 < steps.left;
        stage += 16 * kRowBytes;
        cuda::copy_async_16(stage, grad + 16 * grads.row_bytes, inside ? grad_bytes : 0);
        cuda::copy_async_16(stage + kPanel, input + 16 * inputs.row_bytes,
                            inside ? input_bytes : 0);
        step |= kSecondHalf;
      }
      if (steps.advance()) {
        find_rows();
      } else {
        grad += kDepth * grads.row_bytes;
        input += kDepth * inputs.row_bytes;
      }
    }
    cuda::copy_async_commit();
    return step;
  };
  const auto load = [&](Fragments& to_registers, int slot, int first) {
    const char* stage = shared + slot * kStage;
    warp.load_grads(to_registers.grads, stage, first);
    warp.load_inputs(to_registers.inputs, stage + kPanel, first);
  };

  Sums acc, sum;
  acc.clear();
  sum.clear();
  Fragments first_half, second_half;
  unsigned queue = 0;
  for (int slot = 0; slot < kStages - 1; ++slot) queue |= copy_next(slot) << slot * kBits;
  cuda::copy_async_wait<kStages - 2>();
  __syncthreads();
  load(first_half, 0, 0);
  while (queue & kExists) {
#pragma unroll
    for (int slot = 0; slot < kStages; ++slot) {
      load(second_half, slot, 16);
      // into the stage whose readers passed the last barrier
      queue |= copy_next((slot + kStages - 1) % kStages) << (kStages - 1) * kBits;
      acc.multiply_add<T>(first_half.grads, first_half.inputs);
      cuda::copy_async_wait<kStages - 2>();
      __syncthreads();
      load(first_half, (slot + 1) % kStages, 0);
      if (queue & kSecondHalf) acc.multiply_add<T>(second_half.grads, second_half.inputs);
      if (queue & kLastOfSegment) sum.flush(acc);
      queue >>= kBits;
      if (!(queue & kExists)) break;
    }
  }
  cuda::copy_async_wait<0>();

  End::run(
      out, weight, tile.row, tile.col, thread, shared,
      [&](const auto& put) { sum.visit(warp, put); }, [] { __syncthreads(); });
}

}  // namespace

bool linear_mma_takes(const LinearSensitivityParams& p) {
  const auto aligned = [](const void* data, int64_t row_stride, int64_t col_stride) {
    return col_stride == 1 && row_stride % 8 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  };
  return p.dtype != DType::f32 && aligned(p.inputs, p.inputs_row_stride, p.inputs_col_stride) &&
         aligned(p.grad_outputs, p.grads_row_stride, p.grads_col_stride);
}

void linear_mma_cuda(const LinearSensitivityParams& p, void* stream) {
  const int64_t tiles =
      cuda::ceil_div(p.out_features, kTile) * cuda::ceil_div(p.in_features, kTile);
  const Rows grads{static_cast<const char*>(p.grad_outputs), p.grads_row_stride * 2,
                   p.out_features};
  const Rows inputs{static_cast<const char*>(p.inputs), p.inputs_row_stride * 2, p.in_features};
  const Outputs out(p.score, p.out_features, p.in_features, p.sums, kTile, p.workspace);
  const Matrix weight(p.weight, p.weight_dtype, p.weight_row_stride, p.weight_col_stride);
  const auto run = [&](auto kernel) {
    cuda::launch(kernel, dim3(static_cast<unsigned>(tiles)), dim3(kThreads), kShared,
                 static_cast<cudaStream_t>(stream), p, grads, inputs, out, weight);
  };
  p.dtype == DType::f16 ? run(multiply_segments<half>) : run(multiply_segments<bfloat16>);
  add_slots_cuda(out, stream);
}

}  // namespace pkt
