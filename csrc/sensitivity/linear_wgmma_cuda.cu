// SPDX-License-Identifier: Apache-2.0
// Sensitivity of a linear layer's weight on sm_90a, for the operands linear_mma_cuda.cu takes.
// Reachable only by variant 3 until a card has verified it: so far it has run under the host
// emulation alone.
//
// A block owns a tile of 128 x 192 scores. One thread copies, by TMA, up to 64 rows of both
// operands a stage, as many as the sample still has, five stages in turn; two warpgroups multiply,
// 64 x 192 scores each, wgmma reading both operands from shared memory as they are stored: 96
// float32 a thread for the running sample and 96 for the sum. At a boundary sum += |acc|, and the
// next product does not add. Each warpgroup releases stages by itself: while one flushes the other
// may be a stage ahead and keeps the tensor cores busy. What a stage holds, the copying thread
// leaves beside it.
//   A sample's last rows are multiplied by 16; those beyond its end, which are another sample's or
//   nobody's, are set to zero in shared memory first.
//   Bound (computed): tensor cores; 640 cycles of shared memory reads to 768 for 64 rows. The L2
//   cache delivers 40 KB for them, 53 bytes a cycle and multiprocessor, which may bound it first.
// Not done: panels of inputs shared by a cluster of two blocks (12 KB less), a grid that stays and
// copies the next tile's first stages during a tile's end.
#include "core/cuda/hopper.cuh"
#include "sensitivity/mma_tile.cuh"

namespace pkt {
namespace {

using cuda::Turn;
using mma_tile::Steps;
using mma_tile::TilePlace;

constexpr int kRows = 128, kCols = 192;  // of a tile
constexpr int kGroup = 128;              // threads of a warpgroup
constexpr int kMultiply = 2 * kGroup, kThreads = 3 * kGroup;
constexpr int kDepth = 64, kStages = 5;
constexpr int kBox = kDepth * 128;                                // bytes of 64 columns
constexpr int kGradBoxes = kRows / 64, kInputBoxes = kCols / 64;  // a warpgroup's, and all
constexpr int kStage = (kGradBoxes + kInputBoxes) * kBox;

using End = TileEnd<kRows, kCols, kMultiply, 32>;
static_assert(End::kShared <= kStages * kStage, "the tile's end uses the stages' memory");

struct Pipeline {
  cuda::Barrier full[kStages], empty[kStages];
  int held[kStages];  // rows of a stage, negative at a sample's end, 0 after the last
};

constexpr int kAlign = 1024;  // of a box
constexpr size_t kShared = kAlign + kStages * kStage + sizeof(Pipeline);

// Sets the rows [first, end) of the warpgroup's box of grads and of all boxes of inputs to zero.
[[maybe_unused]] __device__ __forceinline__ void clear_rows(char* grads, char* inputs, int first,
                                                            int end, int thread) {
  constexpr int kChunks = (1 + kInputBoxes) * 8;  // of 16 bytes in a row
  for (int i = thread; i < (end - first) * kChunks; i += kGroup) {
    const int box = i / 8 % (1 + kInputBoxes);
    char* line = (box == 0 ? grads : inputs + (box - 1) * kBox) + (first + i / kChunks) * 128;
    *reinterpret_cast<uint4*>(line + i % 8 * 16) = uint4{0, 0, 0, 0};
  }
  cuda::fence_for_async();
}

// acc (+)= the products of a stage's first 16 kGroups rows.
template <typename T, int kGroups>
__device__ __forceinline__ void multiply(float (&acc)[96], const char* grads, const char* inputs,
                                         bool add) {
  cuda::accumulator_fence(acc);
  cuda::wgmma_fence();
#pragma unroll
  for (int row = 0; row < kGroups * 16; row += 16) {
    cuda::wgmma_m64n192k16<T>(acc, cuda::columns_descriptor(grads + row * 128, kBox),
                              cuda::columns_descriptor(inputs + row * 128, kBox), add || row > 0);
  }
  cuda::wgmma_commit();
  cuda::wgmma_wait_all();
  cuda::accumulator_fence(acc);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    multiply_boxes(LinearSensitivityParams p, const __grid_constant__ cuda::TensorMap grads,
                   const __grid_constant__ cuda::TensorMap inputs, Outputs out, Matrix weight) {
#if defined(PKT_HOPPER) || defined(PKT_EXT_EMULATED)
  char* shared = cuda::shared_memory<char>();
  shared += -cuda::shared_address(shared) % kAlign;
  auto* const pipe = reinterpret_cast<Pipeline*>(shared + kStages * kStage);
  const int thread = static_cast<int>(threadIdx.x);
  const TilePlace tile(blockIdx.x, cuda::ceil_div(p.out_features, kRows),
                       cuda::ceil_div(p.in_features, kCols));
  if (thread == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      cuda::barrier_init(&pipe->full[stage], 1);
      cuda::barrier_init(&pipe->empty[stage], kMultiply / 32);  // a lane of each warp
    }
    cuda::barrier_init_done();
  }
  __syncthreads();

  if (thread >= kMultiply) {
    cuda::give_registers<40>();
    if (thread != kMultiply) return;
    Turn<kStages> turn;
    for (Steps<kDepth> steps(p);; steps.advance(), turn.next()) {
      cuda::barrier_wait(&pipe->empty[turn.stage], turn.parity ^ 1);
      cuda::Barrier* const full = &pipe->full[turn.stage];
      int& held = pipe->held[turn.stage];
      if (steps.left <= 0) {
        held = 0;
        cuda::barrier_arrive(full);
        return;
      }
      held = steps.last_of_segment() ? -steps.left : kDepth;
      cuda::barrier_arrive_expecting(full, kStage);
      char* box = shared + turn.stage * kStage;
      for (int i = 0; i < kGradBoxes; ++i, box += kBox) {
        cuda::copy_box(box, grads, static_cast<int>(tile.row) * kRows + i * 64, steps.row, full);
      }
      for (int i = 0; i < kInputBoxes; ++i, box += kBox) {
        cuda::copy_box(box, inputs, static_cast<int>(tile.col) * kCols + i * 64, steps.row, full);
      }
    }
  } else {
    cuda::take_registers<232>();
    const int group = thread / kGroup;
    float acc[96] = {}, sum[96] = {};
    bool add = false;
#pragma unroll 1
    for (Turn<kStages> turn;; turn.next()) {
      cuda::barrier_wait(&pipe->full[turn.stage], turn.parity);
      const int held = pipe->held[turn.stage];
      if (held == 0) break;
      const int count = held < 0 ? -held : held;
      char* const grad_box = shared + turn.stage * kStage + group * kBox;
      char* const input_boxes = shared + turn.stage * kStage + kGradBoxes * kBox;
      if (count % 16 != 0) {
        clear_rows(grad_box, input_boxes, count, (count + 15) / 16 * 16, thread % kGroup);
        cuda::named_barrier(1 + group, kGroup);
      }
      switch ((count + 15) / 16) {
        case 1:
          multiply<T, 1>(acc, grad_box, input_boxes, add);
          break;
        case 2:
          multiply<T, 2>(acc, grad_box, input_boxes, add);
          break;
        case 3:
          multiply<T, 3>(acc, grad_box, input_boxes, add);
          break;
        default:
          multiply<T, 4>(acc, grad_box, input_boxes, add);
      }
      add = held > 0;
      if (thread % 32 == 0) cuda::barrier_arrive(&pipe->empty[turn.stage]);
      if (held < 0) {
#pragma unroll
        for (int i = 0; i < 96; ++i) sum[i] += fabsf(acc[i]);
      }
    }
    const auto visit = [&](const auto& put) {
      const int top = thread / 32 * 16 + thread % 32 / 4, left = thread % 4 * 2;
#pragma unroll
      for (int i = 0; i < 96; ++i) put(top + i / 2 % 2 * 8, left + i / 4 * 8 + i % 2, sum[i]);
    };
    End::run(out, weight, tile.row, tile.col, thread, shared, visit,
             [] { cuda::named_barrier(3, kMultiply); });
  }
#else
  __trap();
#endif
}

}  // namespace

bool linear_wgmma_takes(const LinearSensitivityParams& p) {
  constexpr int64_t kMost = int64_t{1} << 31;
  return linear_mma_takes(p) && cuda::is_hopper() && p.in_features < kMost &&
         p.out_features < kMost && p.grads_row_stride > 0 && p.inputs_row_stride > 0;
}

void linear_wgmma_cuda(const LinearSensitivityParams& p, void* stream) {
  const int64_t tiles =
      cuda::ceil_div(p.out_features, kRows) * cuda::ceil_div(p.in_features, kCols);
  const auto grads =
      cuda::tensor_map(p.grad_outputs, p.rows, p.out_features, p.grads_row_stride * 2, kDepth);
  const auto inputs =
      cuda::tensor_map(p.inputs, p.rows, p.in_features, p.inputs_row_stride * 2, kDepth);
  const Outputs out(p.score, p.out_features, p.in_features, p.sums, kCols, p.workspace);
  const Matrix weight(p.weight, p.weight_dtype, p.weight_row_stride, p.weight_col_stride);
  const auto run = [&](auto kernel) {
    cuda::launch(kernel, dim3(static_cast<unsigned>(tiles)), dim3(kThreads), kShared,
                 static_cast<cudaStream_t>(stream), p, grads, inputs, out, weight);
  };
  p.dtype == DType::f16 ? run(multiply_boxes<half>) : run(multiply_boxes<bfloat16>);
  add_slots_cuda(out, stream);
}

}  // namespace pkt
