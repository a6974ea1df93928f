// SPDX-License-Identifier: Apache-2.0
// The correction of neuron scores on the tensor cores (mma.sync, sm_80 and later): the product of
// neurons and a 16-bit head with the sum over tokens in its epilogue. Logits never reach memory.
//
// A block of 8 warps owns 128 neurons and a run of tiles of 128 tokens each. A tile is a product
// over the depth in steps of 32, copied asynchronously two ahead into three stages of shared
// memory; the steps of all tiles of the run form one sequence, so that the next tile's first steps
// arrive during a tile's epilogue. A warp multiplies 64 x 32 of a tile: 4 x 4 products m16n8k16,
// each twice, with the high and the low part of the neurons' weights and one and the same head
// fragment. Both operands lie with the depth contiguous, as m16n8k16 wants them.
//   Epilogue, sample by sample: 64 terms a thread, summed over its 8 tokens, then over the four
//   lanes that share a row; the first of them keeps the run's sum in the workspace, a slot a column
//   of warps, which no other thread touches (product_cuda.cu adds them up).
//   Every sum has a fixed order: equal bits in every run.
//   Bound (computed, no card has timed it): tensor cores, twice the product's FLOPs; 40 KB of
//   shared memory read for 16 of the depth, 320 cycles to 512 on sm_80; the epilogue about 25
//   instructions an element and sample, 3 % of a tile's cycles at a depth of 5120.
// Dropped: one part of the weights, half the work: its error, 2^-9 of every product in bfloat16,
// moves the cut of a top-k where corrections are large.
#include "core/cuda/load.cuh"
#include "core/cuda/mma.cuh"
#include "neuron_score/product_cuda.h"
#include "neuron_score/term.cuh"

namespace pkt {
namespace {

constexpr int kTile = NeuronProductGrid::kRows;  // tokens too
constexpr int kThreads = 256;                    // 2 x 4 warps
constexpr int kDepth = 32, kStages = 3;
constexpr int kRowBytes = kDepth * 2;
constexpr int kPanel = kTile * kRowBytes;
constexpr int kStage = 3 * kPanel;  // high, low, head
static_assert(kTile * kRowBytes / 16 == 2 * kThreads, "a thread copies two chunks of a panel");

// Byte offset of a row's 16-byte chunk in a panel. Two rows fill the banks once; chunks change
// places so that the eight rows of a matrix that ldmatrix reads meet no bank twice.
__device__ __forceinline__ int panel_offset(int row, int chunk) {
  return row * kRowBytes + ((chunk ^ row / 2 % 4) << 4);
}

// What a thread copies: chunk thread % 4 of the rows thread / 4 and 64 after it, of each panel.
struct Copies {
  const char *high, *low, *head;  // of the first row, depth 0
  int64_t row_bytes, head_bytes;  // between rows
  int64_t column;                 // of the first tile's first row
  int64_t columns, head_depth;
  char* to;
  int chunk;
  bool in_first, in_second;  // whether the neurons' rows exist

  __device__ __forceinline__ Copies(const NeuronProductParams& p, int64_t top, int64_t left,
                                    int thread, char* shared)
      : row_bytes(p.depth * 2),
        head_bytes(p.head_stride * 2),
        column(left + thread / 4),
        columns(p.score.columns),
        head_depth(p.head_depth),
        to(shared + panel_offset(thread / 4, thread % 4)),
        chunk(thread % 4) {
    const int64_t row = top + thread / 4;
    in_first = row < p.score.rows;
    in_second = row + 64 < p.score.rows;
    high = static_cast<const char*>(p.weights) + row * row_bytes + chunk * 16;
    low = high + p.score.rows * row_bytes;
    head = static_cast<const char*>(p.head) + chunk * 16;
  }

  // Tile `tile` of the run, depth 32 `step`, into `stage`.
  __device__ __forceinline__ void start(int64_t tile, int64_t step, int stage) const {
    char* const out = to + stage * kStage;
    const int64_t at = step * kRowBytes;
    const int64_t left = head_depth - step * kDepth - chunk * 8;
    const int depth_bytes = left >= 8 ? 16 : left > 0 ? static_cast<int>(left) * 2 : 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int below = half * 64;
      const bool in = half ? in_second : in_first;
      const int64_t skip = in ? below * row_bytes + at : 0;
      // rows past the last one are not read, but their addresses stay inside
      const char* const from_high = in ? high + skip : head - chunk * 16;
      const char* const from_low = in ? low + skip : head - chunk * 16;
      cuda::copy_async_16(out + below * kRowBytes, from_high, in ? 16 : 0);
      cuda::copy_async_16(out + kPanel + below * kRowBytes, from_low, in ? 16 : 0);
      const int64_t token = column + tile * kTile + below;
      const int bytes = token < columns ? depth_bytes : 0;
      cuda::copy_async_16(out + 2 * kPanel + below * kRowBytes,
                          bytes ? head + token * head_bytes + at : head - chunk * 16, bytes);
    }
  }
};

struct Warp {
  int lane, top, left;  // of 64 x 32 products in the tile

  explicit __device__ __forceinline__ Warp(int thread)
      : lane(thread % 32), top(thread / 128 * 64), left(thread / 32 % 4 * 32) {}

  // 64 neurons by 16 of the depth from `first` (in chunks) on. Lane 8 j + r names row r of
  // ldmatrix's matrix j.
  __device__ __forceinline__ void load_weights(uint32_t (&out)[4][4], const char* panel,
                                               int first) const {
    const int row = top + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      cuda::ldmatrix_x4<false>(out[i], panel + panel_offset(row + 16 * i, first + lane / 16));
    }
  }
  // 32 tokens by 16 of the depth.
  __device__ __forceinline__ void load_head(uint32_t (&out)[2][4], const char* panel,
                                            int first) const {
    const int row = left + lane / 16 * 8 + lane % 8;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      cuda::ldmatrix_x4<false>(out[j], panel + panel_offset(row + 16 * j, first + lane / 8 % 2));
    }
  }
};

using Tile = float[4][4][4];  // [16 rows each][8 columns each][fragment C]

template <typename T>
__device__ __forceinline__ void multiply_add(Tile& acc, const uint32_t (&weights)[4][4],
                                             const uint32_t (&head)[2][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t b[2] = {head[j / 2][j % 2 * 2], head[j / 2][j % 2 * 2 + 1]};
      cuda::mma_m16n8k16<T>(acc[i][j], weights[i], b);
    }
  }
}

// Adds a tile's terms, for every sample, to this thread's slots; the run's first tile sets them.
template <bool kCapped>
__device__ __forceinline__ void add_terms(const NeuronScoreParams& p, const Tile& acc,
                                          const Warp& warp, int64_t top, int64_t left, float* slots,
                                          int64_t slot_rows, bool first) {
  const int64_t row = top + warp.top + warp.lane / 4;
  const int64_t token = left + warp.left + warp.lane % 4 * 2;
  for (int64_t sample = 0; sample < p.samples; ++sample) {
    const Planes<kCapped> planes(p, sample);
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // rows: 8 apart
      const int64_t at = row + 8 * i;
      const float scale = at < p.rows ? p.scale(sample, at) : 0.0f;
      const float centre = at < p.rows ? p.centre(sample, at) : 0.0f;
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < 8; ++j) {  // tokens: pairs, 8 apart
        const int64_t v = token + j / 2 * 8 + j % 2;
        if (v < p.columns) {
          sum += planes.term(v, acc[i / 2][j / 2][i % 2 * 2 + j % 2], scale, centre, p.cap);
        }
      }
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (warp.lane % 4 == 0) {
        float& slot = slots[sample * slot_rows + at];
        slot = first ? sum : slot + sum;
      }
    }
  }
}

template <typename T, bool kCapped>
__global__ void __launch_bounds__(kThreads, 1)
    multiply_neurons(NeuronProductParams p, NeuronProductGrid grid) {
  char* const shared = cuda::shared_memory<char>();
  const int thread = static_cast<int>(threadIdx.x);
  const Warp warp(thread);
  const int64_t top = int64_t{blockIdx.x} * kTile;
  const int64_t first_tile = int64_t{blockIdx.y} * grid.run;
  const int64_t behind = grid.column_tiles - first_tile;
  const int64_t tiles = behind < grid.run ? behind : grid.run;
  const int64_t steps = p.depth / kDepth;
  const int64_t slot_rows = grid.slot_rows();
  const int64_t slot = int64_t{blockIdx.y} * grid.parts + warp.left / 32;
  float* const slots = p.workspace + slot * p.score.samples * slot_rows;

  const Copies copies(p, top, first_tile * kTile, thread, shared);
  int64_t next_tile = 0, next_step = 0;
  const auto copy_next = [&](int stage) {
    if (next_tile < tiles) {
      copies.start(next_tile, next_step, stage);
      if (++next_step == steps) {
        next_step = 0;
        ++next_tile;
      }
    }
    cuda::copy_async_commit();
  };

  Tile acc = {};
  copy_next(0);
  copy_next(1);
  int stage = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    for (int64_t step = 0; step < steps; ++step) {
      cuda::copy_async_wait<kStages - 2>();
      __syncthreads();
      // into the stage whose readers passed this barrier
      copy_next(stage == 0 ? kStages - 1 : stage - 1);
      const char* const panels = shared + stage * kStage;
#pragma unroll
      for (int half = 0; half < kDepth / 16; ++half) {
        uint32_t weights[4][4], head[2][4];
        warp.load_head(head, panels + 2 * kPanel, 2 * half);
        warp.load_weights(weights, panels, 2 * half);
        multiply_add<T>(acc, weights, head);
        warp.load_weights(weights, panels + kPanel, 2 * half);
        multiply_add<T>(acc, weights, head);
      }
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    add_terms<kCapped>(p.score, acc, warp, top, (first_tile + tile) * kTile, slots, slot_rows,
                       tile == 0);
#pragma unroll
    for (int i = 0; i < 64; ++i) acc[i / 16][i / 4 % 4][i % 4] = 0.0f;
  }
  cuda::copy_async_wait<0>();
}

}  // namespace

void neuron_product_mma(const NeuronProductParams& p, const NeuronProductGrid& grid, void* stream) {
  const dim3 blocks(static_cast<unsigned>(grid.row_tiles), static_cast<unsigned>(grid.runs));
  const auto run = [&](auto kernel) {
    cuda::launch(kernel, blocks, dim3(kThreads), size_t{kStages * kStage},
                 static_cast<cudaStream_t>(stream), p, grid);
  };
  const bool capped = p.score.cap > 0.0f;
  if (p.dtype == DType::f16) {
    capped ? run(multiply_neurons<half, true>) : run(multiply_neurons<half, false>);
  } else if (p.dtype == DType::bf16) {
    capped ? run(multiply_neurons<bfloat16, true>) : run(multiply_neurons<bfloat16, false>);
  } else {
    throw std::logic_error("neuron_product: dtype the binding does not admit");
  }
}

}  // namespace pkt
