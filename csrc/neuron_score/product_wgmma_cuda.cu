// SPDX-License-Identifier: Apache-2.0
// The correction of neuron scores on sm_90a, for what product_mma_cuda.cu takes. Reachable only by
// name until a card has verified it: so far it has run under the host emulation alone.
//
// A block owns 128 neurons and a run of tiles of 192 tokens each. One thread copies, by TMA, 64 of
// the depth a stage: the neurons' high and low parts and the tokens' rows of the head, four stages
// in turn through all tiles of the run. Two warpgroups multiply, 64 x 192 each, wgmma reading both
// operands from shared memory as they are stored, the depth contiguous; the low part adds to the
// same sums. While one warpgroup sums a tile's terms the other may be stages ahead.
//   Epilogue, sample by sample: 96 terms a thread, 48 tokens of two rows, then the four lanes that
//   share a row; the first of them keeps the run's sum in the workspace.
//   Bound (computed): tensor cores, 1536 cycles for 64 of the depth and both parts; 56 KB from the
//   L2 cache for them.
// Not done: the head's panels shared by a cluster of two blocks.
#include "core/cuda/hopper.cuh"
#include "neuron_score/product_cuda.h"
#include "neuron_score/term.cuh"

namespace pkt {
namespace {

constexpr int kRows = NeuronProductGrid::kRows, kCols = 192;  // of a tile
constexpr int kGroup = 128;                                   // threads of a warpgroup
constexpr int kThreads = 3 * kGroup;
[[maybe_unused]] constexpr int kMultiply = 2 * kGroup;  // threads that do
constexpr int kDepth = cuda::kBoxCols, kStages = 4;
constexpr int kLine = kDepth * 2;
constexpr int kPart = kRows * kLine, kStage = 2 * kPart + kCols * kLine;  // high, low, head

struct Pipeline {
  cuda::Barrier full[kStages], empty[kStages];
};

constexpr int kAlign = 1024;  // of a box
constexpr size_t kShared = kAlign + kStages * kStage + sizeof(Pipeline);
static_assert(kShared <= 227 * 1024, "what a block may have on sm_90");
static_assert(kPart % kAlign == 0 && kStage % kAlign == 0, "boxes stay aligned");

// acc (+)= a stage's products, of the warpgroup's 64 neurons.
template <typename T>
__device__ __forceinline__ void multiply(float (&acc)[96], const char* stage, int group, bool add) {
  const char* const weights = stage + group * 64 * kLine;
  cuda::accumulator_fence(acc);
  cuda::wgmma_fence();
#pragma unroll
  for (int part = 0; part < 2; ++part) {
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      cuda::wgmma_m64n192k16<T, true>(acc, cuda::depth_descriptor(weights + part * kPart, k),
                                      cuda::depth_descriptor(stage + 2 * kPart, k),
                                      add || part + k > 0);
    }
  }
  cuda::wgmma_commit();
  cuda::wgmma_wait_all();
  cuda::accumulator_fence(acc);
}

// Adds a tile's terms, for every sample, to this thread's slots; the run's first tile sets them.
template <bool kCapped>
__device__ __forceinline__ void add_terms(const NeuronScoreParams& p, const float (&acc)[96],
                                          int row, int token, float* slots, int64_t slot_rows,
                                          bool first) {
  const int rows = static_cast<int>(p.rows), columns = static_cast<int>(p.columns);
  for (int64_t sample = 0; sample < p.samples; ++sample) {
    const Planes<kCapped> planes(p, sample);
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // rows: 8 apart
      const int at = row + 8 * half;
      const float scale = at < rows ? p.scale(sample, at) : 0.0f;
      const float centre = at < rows ? p.centre(sample, at) : 0.0f;
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < 48; ++j) {  // tokens: pairs, 8 apart
        const int v = token + j / 2 * 8 + j % 2;
        if (v < columns) {
          sum += planes.term(v, acc[j / 2 * 4 + half * 2 + j % 2], scale, centre, p.cap);
        }
      }
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (threadIdx.x % 4 == 0) {
        float& slot = slots[sample * slot_rows + at];
        slot = first ? sum : slot + sum;
      }
    }
  }
}

template <typename T, bool kCapped>
__global__ void __launch_bounds__(kThreads, 1)
    multiply_neuron_boxes(NeuronProductParams p, NeuronProductGrid grid,
                          const __grid_constant__ cuda::TensorMap high,
                          const __grid_constant__ cuda::TensorMap low,
                          const __grid_constant__ cuda::TensorMap head) {
#if defined(PKT_HOPPER) || defined(PKT_EXT_EMULATED)
  char* shared = cuda::shared_memory<char>();
  shared += -cuda::shared_address(shared) % kAlign;
  auto* const pipe = reinterpret_cast<Pipeline*>(shared + kStages * kStage);
  const int thread = static_cast<int>(threadIdx.x);
  const int top = static_cast<int>(blockIdx.x) * kRows;
  const int64_t first_tile = int64_t{blockIdx.y} * grid.run;
  const int64_t behind = grid.column_tiles - first_tile;
  const int64_t tiles = behind < grid.run ? behind : grid.run;
  const int steps = static_cast<int>(cuda::ceil_div(p.depth, kDepth));
  if (thread == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      cuda::barrier_init(&pipe->full[stage], 1);
      cuda::barrier_init(&pipe->empty[stage], kMultiply / 32);  // a lane of each warp
    }
    cuda::barrier_init_done();
  }
  __syncthreads();

  cuda::Turn<kStages> turn;
  if (thread >= kMultiply) {
    cuda::give_registers<40>();
    if (thread != kMultiply) return;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int left = static_cast<int>((first_tile + tile) * kCols);
      for (int step = 0; step < steps; ++step, turn.next()) {
        cuda::barrier_wait(&pipe->empty[turn.stage], turn.parity ^ 1);
        cuda::Barrier* const full = &pipe->full[turn.stage];
        char* const stage = shared + turn.stage * kStage;
        cuda::barrier_arrive_expecting(full, kStage);
        cuda::copy_box(stage, high, step * kDepth, top, full);
        cuda::copy_box(stage + kPart, low, step * kDepth, top, full);
        cuda::copy_box(stage + 2 * kPart, head, step * kDepth, left, full);
      }
    }
  } else {
    cuda::take_registers<232>();
    const int row = top + thread / 32 * 16 + thread % 32 / 4;
    float* const slots = p.workspace + int64_t{blockIdx.y} * p.score.samples * grid.slot_rows();
    float acc[96] = {};
#pragma unroll 1
    for (int64_t tile = 0; tile < tiles; ++tile) {
#pragma unroll 1
      for (int step = 0; step < steps; ++step, turn.next()) {
        cuda::barrier_wait(&pipe->full[turn.stage], turn.parity);
        multiply<T>(acc, shared + turn.stage * kStage, thread / kGroup, step > 0);
        if (thread % 32 == 0) cuda::barrier_arrive(&pipe->empty[turn.stage]);
      }
      const int token = static_cast<int>((first_tile + tile) * kCols) + thread % 4 * 2;
      add_terms<kCapped>(p.score, acc, row, token, slots, grid.slot_rows(), tile == 0);
    }
  }
#else
  __trap();
#endif
}

}  // namespace

void neuron_product_wgmma(const NeuronProductParams& p, const NeuronProductGrid& grid,
                          void* stream) {
  const int64_t rows = p.score.rows, row_bytes = p.depth * 2;
  if (p.score.columns >= int64_t{1} << 31 || rows >= int64_t{1} << 31) {
    throw std::invalid_argument("neuron_product: wgmma counts neurons and tokens in 32 bits");
  }
  const char* const weights = static_cast<const char*>(p.weights);
  const auto high = cuda::tensor_map(weights, rows, p.depth, row_bytes, kRows);
  const auto low = cuda::tensor_map(weights + rows * row_bytes, rows, p.depth, row_bytes, kRows);
  const auto head =
      cuda::tensor_map(p.head, p.score.columns, p.head_depth, p.head_stride * 2, kCols);
  const dim3 blocks(static_cast<unsigned>(grid.row_tiles), static_cast<unsigned>(grid.runs));
  const auto run = [&](auto kernel) {
    cuda::launch(kernel, blocks, dim3(kThreads), kShared, static_cast<cudaStream_t>(stream), p,
                 grid, high, low, head);
  };
  const bool capped = p.score.cap > 0.0f;
  if (p.dtype == DType::f16) {
    capped ? run(multiply_neuron_boxes<half, true>) : run(multiply_neuron_boxes<half, false>);
  } else if (p.dtype == DType::bf16) {
    capped ? run(multiply_neuron_boxes<bfloat16, true>)
           : run(multiply_neuron_boxes<bfloat16, false>);
  } else {
    throw std::logic_error("neuron_product: dtype the binding does not admit");
  }
}

}  // namespace pkt
