// SPDX-License-Identifier: Apache-2.0
// Sensitivity of a linear layer's weight, sample by sample, on the CPU.
//
// linear_sensitivity is a matrix product grads^T inputs whose accumulators are emptied, by
// magnitude, at every segment boundary; the per-sample gradient exists in registers only.
//   - A task is a block of about 160 x 240 scores. It walks the rows in chunks of kDepth: converts
//     the chunk's two panels to float32, runs a register tile (8 x 48 on AVX-512) over them, and
//     keeps the running sums, and the accumulators of a segment cut by the chunk, in L2.
//   - When all rows are done, |weight| is applied once and the block added to the scores and sums.
//   - Every score is the work of one task, in row order, and every block has its own slots for the
//     sums: equal bits on any thread count.
// Bound: float32 FMA throughput; the panels' conversion adds 1/160 + 1/240 of an operation to each.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>

#include "core/parallel.h"
#include "sensitivity/sums_cpu.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define PKT_X86_TILES 1
#endif

namespace pkt {
namespace {

constexpr int64_t kDepth = 128;           // rows of a chunk: 24 KiB of a tile's inputs, in L1
constexpr int64_t kBlockRows = 160;       // of scores; together with the chunk's panels and the
constexpr int64_t kBlockCols = 240;       // carried accumulators a block fills about 0.5 MiB of L2
constexpr int64_t kThreadFmas = 1 << 22;  // multiply-adds worth waking a thread for
constexpr int64_t kLine = 16;             // floats of a cache line
constexpr int64_t kMostBlocks = 8;        // 64 x 64 blocks along a block of scores

using TileFunction = void (*)(const float* grads, const float* inputs, int64_t stride, int64_t row,
                              int64_t last, const int64_t* end, bool carried, float* sum,
                              float* carry, int64_t sum_stride);

struct Tile {
  int64_t rows, cols;
  TileFunction run;
};

#define PKT_TILE_NAME tile_baseline
#define PKT_TILE_TARGET
#define PKT_TILE_LANES 4
#define PKT_TILE_ROWS 4
#define PKT_TILE_VECTORS 2
#define PKT_TILE_FMA(a, b, c) ((a) * (b) + (c))
#include "sensitivity/sensitivity_tile.h"

#if defined(PKT_X86_TILES)
#define PKT_TILE_NAME tile_avx2
#define PKT_TILE_TARGET __attribute__((target("avx2,fma")))
#define PKT_TILE_LANES 8
#define PKT_TILE_ROWS 6
#define PKT_TILE_VECTORS 2
#define PKT_TILE_FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#include "sensitivity/sensitivity_tile.h"

#define PKT_TILE_NAME tile_avx512
#define PKT_TILE_TARGET __attribute__((target("avx512f")))
#define PKT_TILE_LANES 16
#define PKT_TILE_ROWS 8
#define PKT_TILE_VECTORS 3
#define PKT_TILE_FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#include "sensitivity/sensitivity_tile.h"
#endif

Tile choose_tile(int variant) {
#if defined(PKT_X86_TILES)
  __builtin_cpu_init();
  const int level = variant < 0 ? 2 : variant;
  if (level >= 2 && __builtin_cpu_supports("avx512f")) return Tile{8, 48, tile_avx512};
  if (level >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return Tile{6, 16, tile_avx2};
  }
#endif
  return Tile{4, 8, tile_baseline};
}

int64_t round_up(int64_t value, int64_t unit) {
  return ceil_div(value, unit) * unit;
}

// How the scores are cut into blocks, and the layout of one worker's scratch.
struct Plan {
  Tile tile;
  int64_t block_rows, block_cols;  // whole tiles
  int64_t row_blocks, col_blocks, tasks;
  int64_t inputs_at, stride;  // a panel row: grads [block_rows], then inputs [block_cols]
  int64_t panels, scratch;    // floats

  explicit Plan(const LinearSensitivityParams& p) : tile(choose_tile(p.variant)) {
    const int64_t unit = p.sums.blocks ? kSumBlock : 1;  // then each of those belongs to one task
    block_rows = even_block(p.out_features, kBlockRows, std::lcm(tile.rows, unit));
    block_cols = even_block(p.in_features, kBlockCols, std::lcm(tile.cols, unit));
    row_blocks = ceil_div(p.out_features, block_rows);
    col_blocks = ceil_div(p.in_features, block_cols);
    tasks = row_blocks * col_blocks;
    inputs_at = round_up(block_rows, kLine);
    stride = inputs_at + round_up(block_cols, kLine);
    if (stride / kLine % 2 == 0) stride += kLine;  // else the rows share a few sets of the L1
    panels = std::min(kDepth, p.rows) * stride;
    scratch = round_up(panels + 2 * block_rows * block_cols, kLine);
  }

  int64_t workers(const LinearSensitivityParams& p, int threads) const {
    const int64_t useful = 1 + p.rows * p.in_features * p.out_features / kThreadFmas;
    return std::min({int64_t{threads}, tasks, useful});
  }

  // Blocks of nearly equal size rather than a small last one.
  SumSlots slots(const LinearSensitivityParams& p) const {
    return SumSlots(p.sums, p.out_features, p.in_features, col_blocks, row_blocks, p.workspace);
  }

  static int64_t even_block(int64_t size, int64_t target, int64_t unit) {
    return round_up(ceil_div(size, ceil_div(size, target)), unit);
  }
};

// out[j] = values[j] for j < count, 0 up to `padded`.
template <typename T>
PKT_SIMD_CLONES void convert_row(float* out, const T* values, int64_t stride, int64_t count,
                                 int64_t padded) {
  if (stride == 1) {
    for (int64_t j = 0; j < count; ++j) out[j] = to_float(values[j]);
  } else {
    for (int64_t j = 0; j < count; ++j) out[j] = to_float(values[j * stride]);
  }
  for (int64_t j = count; j < padded; ++j) out[j] = 0.0f;
}

// sum[j] *= |weight[j]|
template <typename T>
PKT_SIMD_CLONES void apply_weight(float* sum, const T* weight, int64_t stride, int64_t count) {
  if (stride == 1) {
    for (int64_t j = 0; j < count; ++j) sum[j] *= std::fabs(to_float(weight[j]));
  } else {
    for (int64_t j = 0; j < count; ++j) sum[j] *= std::fabs(to_float(weight[j * stride]));
  }
}

// The sums of one block of scores; leaves them in scratch + plan.panels, row-major.
template <typename T>
void sum_block(const LinearSensitivityParams& p, const Plan& plan, const T* inputs, const T* grads,
               int64_t height, int64_t width, float* scratch) {
  float* sums = scratch + plan.panels;
  float* carry = sums + plan.block_rows * plan.block_cols;
  std::fill(sums, carry, 0.0f);
  const int64_t tall = round_up(height, plan.tile.rows);
  const int64_t wide = round_up(width, plan.tile.cols);
  const int64_t* end = p.segments + 1;
  bool carried = false;
  const int64_t covered = p.segments[p.segment_count];
  for (int64_t row = p.segments[0]; row < covered;) {
    const int64_t last = std::min(row + kDepth, covered);
    for (int64_t k = row; k < last; ++k) {
      float* panel = scratch + (k - row) * plan.stride;
      convert_row(panel, grads + k * p.grads_row_stride, p.grads_col_stride, height, tall);
      convert_row(panel + plan.inputs_at, inputs + k * p.inputs_row_stride, p.inputs_col_stride,
                  width, wide);
    }
    for (int64_t j = 0; j < wide; j += plan.tile.cols) {
      for (int64_t i = 0; i < tall; i += plan.tile.rows) {
        const int64_t place = i * plan.block_cols + j;
        plan.tile.run(scratch + i, scratch + plan.inputs_at + j, plan.stride, row, last, end,
                      carried, sums + place, carry + place, plan.block_cols);
      }
    }
    while (end <= p.segments + p.segment_count && *end <= last) ++end;
    carried = end[-1] < last;
    row = last;
  }
}

// Adds one block, whose magnitudes lie in `sums`, to the scores and the sums.
template <typename W>
void add_block(const LinearSensitivityParams& p, const Plan& plan, const SumSlots& slots,
               int64_t row_block, int64_t col_block, float* sums) {
  const int64_t top = row_block * plan.block_rows, left = col_block * plan.block_cols;
  const int64_t height = std::min(plan.block_rows, p.out_features - top);
  const int64_t width = std::min(plan.block_cols, p.in_features - left);
  const W* weight = static_cast<const W*>(p.weight) + left * p.weight_col_stride;
  double* cols = slots.cols ? slots.cols + row_block * p.in_features + left : nullptr;
  if (cols) std::fill(cols, cols + width, 0.0);
  double total = 0.0;
  double blocks[kMostBlocks] = {};  // of one row of 64 x 64 blocks
  bool special = false;
  for (int64_t i = 0; i < height; ++i) {
    const int64_t row = top + i;
    float* sum = sums + i * plan.block_cols;
    apply_weight(sum, weight + row * p.weight_row_stride, p.weight_col_stride, width);
    special |=
        add_contributions(p.score ? p.score + row * p.in_features + left : nullptr, sum, width);
    if (!p.sums.any_sum()) continue;
    const double row_sum = tally(sum, width, blocks, cols);
    total += row_sum;
    if (slots.rows) slots.rows[col_block * p.out_features + row] = row_sum;
    if (p.sums.blocks && ((row + 1) % kSumBlock == 0 || i + 1 == height)) {
      const int64_t across = ceil_div(p.in_features, kSumBlock);
      double* out = p.sums.blocks + row / kSumBlock * across + left / kSumBlock;
      for (int64_t j = 0; j < ceil_div(width, kSumBlock); ++j) out[j] += blocks[j], blocks[j] = 0;
    }
  }
  if (slots.totals) slots.totals[row_block * plan.col_blocks + col_block] = total;
  if (special) raise_flag(p.sums.nonfinite);
}

template <typename T, typename W>
void score_blocks(const LinearSensitivityParams& p, int threads) {
  const Plan plan(p);
  const SumSlots slots = plan.slots(p);
  const T* inputs = static_cast<const T*>(p.inputs);
  const T* grads = static_cast<const T*>(p.grad_outputs);
  float* scratches = reinterpret_cast<float*>(static_cast<char*>(p.workspace) +
                                              round_up(slots.bytes, kLine * sizeof(float)));
  std::atomic<int64_t> next{0};
  parallel_for(threads, plan.workers(p, threads), [&](int64_t worker) {
    float* scratch = scratches + worker * plan.scratch;
    for (int64_t task; (task = next++) < plan.tasks;) {
      const int64_t row_block = task % plan.row_blocks, col_block = task / plan.row_blocks;
      const int64_t top = row_block * plan.block_rows, left = col_block * plan.block_cols;
      sum_block(p, plan, inputs + left * p.inputs_col_stride, grads + top * p.grads_col_stride,
                std::min(plan.block_rows, p.out_features - top),
                std::min(plan.block_cols, p.in_features - left), scratch);
      add_block<W>(p, plan, slots, row_block, col_block, scratch + plan.panels);
    }
  });
  add_slots(p.sums, slots, p.out_features, p.in_features, threads);
}

}  // namespace

int64_t linear_sensitivity_workspace_cpu(const LinearSensitivityParams& p, int threads) {
  const Plan plan(p);
  return round_up(plan.slots(p).bytes, kLine * sizeof(float)) +
         plan.workers(p, threads) * plan.scratch * int64_t{sizeof(float)};
}

void linear_sensitivity_cpu(const LinearSensitivityParams& p, int threads) {
  with_float_type(p.dtype, [&](auto value) {
    with_float_type(p.weight_dtype, [&](auto weight) {
      score_blocks<decltype(value), decltype(weight)>(p, threads);
    });
  });
}

}  // namespace pkt
