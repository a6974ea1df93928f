// SPDX-License-Identifier: Apache-2.0
// Sensitivity of a linear layer's weight, sample by sample, on the CPU.
//
// linear_sensitivity is a matrix product grads^T inputs whose accumulators are emptied, by
// magnitude, at every segment boundary; the per-sample gradient exists in registers only.
//   - A task is a block of about 192 x 256 scores. It walks the rows in chunks: packs the chunk's
//     two panels, runs a register tile (6 x 64 on AVX-512) over them, and keeps the running sums,
//     and the accumulators of a segment that the chunk cuts, in L2.
//   - In the last chunk, a tile's sums still in L1, |weight| is applied once and the contributions
//     go to the scores and sums. Scores and weights were prefetched before the tile ran.
//   - Every score is the work of one task, in row order, and every block has its own slots for the
//     sums: equal bits on any thread count.
// bfloat16 operands go through the dot product of pairs where the machine has AVX512_BF16: twice
// the rate, the products exact and the sums float32 as ever, but it takes operands, products and
// sums below 2^-126 for zero.
// Bound: float32 FMA (pair dot product) throughput; the tiles reach 95 to 99 % of it, packing,
// which waits for L3, takes 5 to 10 % of the time and emptying accumulators every 32 rows as much
// again. Tried without gain: tiles of 8 x 48 and 12 x 32, panels laid out tile by tile, larger
// blocks, prefetching the next chunk's rows during the tiles (the prefetches wait instead).
#include <algorithm>
#include <atomic>
#include <cmath>

#include "sensitivity/linear_panels.h"
#include "sensitivity/sums_cpu.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define PKT_X86_TILES 1
#endif

namespace pkt {
namespace {

constexpr int64_t kBlockRows = 192;       // of scores; together with the chunk's panels and the
constexpr int64_t kBlockCols = 256;       // carried accumulators a block fills 0.8 MiB of L2
constexpr int64_t kThreadFmas = 1 << 22;  // multiply-adds worth waking a thread for
constexpr int64_t kLine = 16;             // words of a cache line
constexpr int64_t kMostRows = 8;          // of a tile; its columns divide kSumBlock

using TileFunction = void (*)(const uint32_t* grads, const uint32_t* inputs, int64_t panel_stride,
                              const Pieces& pieces, float* sum, float* carry, int64_t sum_stride);

struct Tile {
  int64_t rows, cols, rows_per_step;
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
#define PKT_TILE_ROWS 6
#define PKT_TILE_VECTORS 4
#define PKT_TILE_FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#include "sensitivity/sensitivity_tile.h"

#define PKT_TILE_NAME tile_avx512_bf16
#define PKT_TILE_TARGET __attribute__((target("avx512f,avx512bf16")))
#define PKT_TILE_LANES 16
#define PKT_TILE_ROWS 6
#define PKT_TILE_VECTORS 4
#define PKT_TILE_FMA(a, b, c) _mm512_dpbf16_ps(c, (__m512bh)(a), (__m512bh)(b))
#include "sensitivity/sensitivity_tile.h"
#endif

Tile choose_tile(DType dtype, int variant) {
#if defined(PKT_X86_TILES)
  __builtin_cpu_init();
  const int level = variant < 0 ? 3 : variant;
  const bool avx512 = __builtin_cpu_supports("avx512f");
  if (level >= 3 && dtype == DType::bf16 && avx512 && __builtin_cpu_supports("avx512bf16")) {
    return Tile{6, 64, 2, tile_avx512_bf16};
  }
  if (level >= 2 && avx512) return Tile{6, 64, 1, tile_avx512};
  if (level >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return Tile{6, 16, 1, tile_avx2};
  }
#endif
  return Tile{4, 8, 1, tile_baseline};
}

int64_t round_up(int64_t value, int64_t unit) {
  return ceil_div(value, unit) * unit;
}

// How the scores are cut into blocks, and the layout of one worker's scratch.
struct Plan {
  Tile tile;
  int64_t block_rows, block_cols;  // multiples of kSumBlock: each block of those has one owner
  int64_t row_blocks, col_blocks, tasks;
  int64_t inputs_at, stride;      // a step of the panels: grads, then inputs; in words
  int64_t panels, sums, scratch;  // both panels, a block's sums, all of it; in words

  explicit Plan(const LinearSensitivityParams& p) : tile(choose_tile(p.dtype, p.variant)) {
    block_rows = even_block(p.out_features, kBlockRows);
    block_cols = even_block(p.in_features, kBlockCols);
    row_blocks = ceil_div(p.out_features, block_rows);
    col_blocks = ceil_div(p.in_features, block_cols);
    tasks = row_blocks * col_blocks;
    const int64_t tall = round_up(block_rows, tile.rows);
    inputs_at = round_up(tall, kLine);
    stride = inputs_at + block_cols;
    if (stride / kLine % 2 == 0) stride += kLine;  // else the steps share a few sets of the L1
    panels = std::min(kSteps, p.rows) * stride;
    sums = tall * block_cols;
    scratch = round_up(panels + 2 * sums, kLine);
  }

  int64_t workers(const LinearSensitivityParams& p, int threads) const {
    const int64_t useful = 1 + p.rows * p.in_features * p.out_features / kThreadFmas;
    return std::min({int64_t{threads}, tasks, useful});
  }

  SumSlots slots(const LinearSensitivityParams& p) const {
    return SumSlots(p.sums, p.out_features, p.in_features, col_blocks, row_blocks, p.workspace);
  }

  // Blocks of nearly equal size rather than a small last one.
  static int64_t even_block(int64_t size, int64_t target) {
    return round_up(ceil_div(size, ceil_div(size, target)), kSumBlock);
  }
};

// The sums, in float64, of a strip of contributions: a tile's rows by kSumBlock columns.
struct alignas(64) Tally {
  double rows[kMostRows];
  double cols[kSumBlock];
};

// Contributions |weight| * sum of a strip: added to the score unless it is null, tallied unless
// `tally` is null. True when a new score or, without one, a contribution is NaN or infinite.
template <typename W>
PKT_SIMD_CLONES bool contribute(float* score, int64_t score_stride, const float* sum,
                                int64_t sum_stride, const W* weight, int64_t weight_stride,
                                int64_t rows, Tally* tally) {
  constexpr int64_t kFloats = 16, kDoubles = 8;
  typedef float Floats __attribute__((vector_size(kDoubles * 4), aligned(4), may_alias));
  typedef double Doubles __attribute__((vector_size(kDoubles * 8)));
  float poison[kFloats] = {};
  if (tally) std::fill_n(tally->cols, kSumBlock, 0.0);
  for (int64_t r = 0; r < rows; ++r, sum += sum_stride, weight += weight_stride) {
    float parts[kSumBlock];
    for (int64_t j = 0; j < kSumBlock; ++j) parts[j] = std::fabs(to_float(weight[j])) * sum[j];
    const float* result = parts;
    if (score) {
      float* to = score + r * score_stride;
      for (int64_t j = 0; j < kSumBlock; ++j) to[j] += parts[j];
      result = to;
    }
    for (int64_t j = 0; j < kSumBlock; j += kFloats) {
      for (int64_t lane = 0; lane < kFloats; ++lane) {
        poison[lane] += result[j + lane] - result[j + lane];  // 0 or, for what is not finite, NaN
      }
    }
    if (!tally) continue;
    Doubles lanes = {};
    for (int64_t j = 0; j < kSumBlock; j += kDoubles) {
      const auto part =
          __builtin_convertvector(*reinterpret_cast<const Floats*>(parts + j), Doubles);
      lanes += part;
      *reinterpret_cast<Doubles*>(tally->cols + j) += part;
    }
    tally->rows[r] = ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) +
                     ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
  }
  float all = 0.0f;
  for (float value : poison) all += value;
  return all != 0.0f;
}

// One task: a block of scores.
template <typename T, typename W>
class Block {
 public:
  Block(const LinearSensitivityParams& params, const Plan& plan, const SumSlots& slots,
        int64_t task, uint32_t* scratch)
      : p_(params),
        plan_(plan),
        slots_(slots),
        task_(task),
        row_block_(task / plan.col_blocks),
        col_block_(task % plan.col_blocks),
        panels_(scratch),
        sums_(reinterpret_cast<float*>(scratch + plan.panels)) {}

  void run() {
    const Tile& tile = plan_.tile;
    const T* grads = static_cast<const T*>(p_.grad_outputs) + top_ * p_.grads_col_stride;
    const T* inputs = static_cast<const T*>(p_.inputs) + left_ * p_.inputs_col_stride;
    const int64_t tall = round_up(height_, tile.rows), wide = round_up(width_, tile.cols);
    std::fill(sums_, sums_ + plan_.sums, 0.0f);
    Chunk chunk(p_, tile.rows_per_step);
    do {
      chunk.advance();
      pack(panels_, plan_.stride, chunk, grads, p_.grads_row_stride, p_.grads_col_stride, height_,
           tall);
      pack(panels_ + plan_.inputs_at, plan_.stride, chunk, inputs, p_.inputs_row_stride,
           p_.inputs_col_stride, width_, wide);
      for (int64_t strip = 0; strip < wide; strip += kSumBlock) {
        for (int64_t i = 0; i < tall; i += tile.rows) {
          if (chunk.is_last()) prefetch(i, strip);
          for (int64_t j = strip; j < std::min(strip + kSumBlock, wide); j += tile.cols) {
            float* sum = sums_ + i * plan_.block_cols + j;
            tile.run(panels_ + i, panels_ + plan_.inputs_at + j, plan_.stride, chunk.pieces, sum,
                     sum + plan_.sums, plan_.block_cols);
          }
          if (chunk.is_last()) finish(i, strip);
        }
      }
    } while (!chunk.is_last());
    if (slots_.totals) slots_.totals[task_] = total_;
  }

 private:
  // Inlined by force: GCC takes a function that only prefetches for one without effect.
  __attribute__((always_inline)) void prefetch(int64_t i, int64_t j) const {
    const int64_t row = top_ + i, col = left_ + j;
    const int64_t cols = std::min(kSumBlock, width_ - j);
    for (int64_t r = row; r < row + std::min(plan_.tile.rows, height_ - i); ++r) {
      if (p_.score) prefetch_row(p_.score + r * p_.in_features + col, cols);
      if (p_.weight_col_stride == 1) prefetch_row(weight_at(r, col), cols);
    }
  }

  template <typename V>
  __attribute__((always_inline)) static void prefetch_row(const V* values, int64_t count) {
    constexpr int64_t kStep = 64 / sizeof(V);
    for (int64_t j = 0; j < count; j += kStep) __builtin_prefetch(values + j);
  }

  const W* weight_at(int64_t row, int64_t col) const {
    return static_cast<const W*>(p_.weight) + row * p_.weight_row_stride +
           col * p_.weight_col_stride;
  }

  // Adds a strip whose sums are complete.
  void finish(int64_t i, int64_t j) {
    const int64_t row = top_ + i, col = left_ + j;
    const int64_t rows = std::min(plan_.tile.rows, height_ - i);
    const int64_t cols = std::min(kSumBlock, width_ - j);
    const float* sum = sums_ + i * plan_.block_cols + j;
    float* score = p_.score ? p_.score + row * p_.in_features + col : nullptr;
    Tally tally;
    Tally* wanted = p_.sums.any_sum() ? &tally : nullptr;
    bool special;
    if (cols == kSumBlock && p_.weight_col_stride == 1) {
      special = contribute(score, p_.in_features, sum, plan_.block_cols, weight_at(row, col),
                           p_.weight_row_stride, rows, wanted);
    } else {  // through copies, with zeros beyond the last column
      W weights[kMostRows * kSumBlock] = {};
      float scores[kMostRows * kSumBlock] = {}, padded[kMostRows * kSumBlock] = {};
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t to = r * kSumBlock;
        for (int64_t k = 0; k < cols; ++k) weights[to + k] = *weight_at(row + r, col + k);
        std::copy_n(sum + r * plan_.block_cols, cols, padded + to);
        if (score) std::copy_n(score + r * p_.in_features, cols, scores + to);
      }
      special = contribute<W>(score ? scores : nullptr, kSumBlock, padded, kSumBlock, weights,
                              kSumBlock, rows, wanted);
      for (int64_t r = 0; score && r < rows; ++r) {
        std::copy_n(scores + r * kSumBlock, cols, score + r * p_.in_features);
      }
    }
    if (special) raise_flag(p_.sums.nonfinite);
    if (wanted) add_tally(tally, i, j, rows, cols);
  }

  void add_tally(const Tally& tally, int64_t i, int64_t j, int64_t rows, int64_t cols) {
    const int64_t row = top_ + i, col = left_ + j;
    for (int64_t r = 0; r < rows; ++r) {
      total_ += tally.rows[r];
      if (slots_.rows) {
        double& slot = slots_.rows[col_block_ * p_.out_features + row + r];
        slot = j ? slot + tally.rows[r] : tally.rows[r];
      }
      if (p_.sums.blocks) {
        p_.sums.blocks[(row + r) / kSumBlock * ceil_div(p_.in_features, kSumBlock) +
                       col / kSumBlock] += tally.rows[r];
      }
    }
    if (!slots_.cols) return;
    double* slot = slots_.cols + row_block_ * p_.in_features + col;
    for (int64_t k = 0; k < cols; ++k) slot[k] = i ? slot[k] + tally.cols[k] : tally.cols[k];
  }

  const LinearSensitivityParams& p_;
  const Plan& plan_;
  const SumSlots& slots_;
  const int64_t task_, row_block_, col_block_;
  uint32_t* const panels_;
  float* const sums_;
  const int64_t top_ = row_block_ * plan_.block_rows, left_ = col_block_ * plan_.block_cols;
  const int64_t height_ = std::min(plan_.block_rows, p_.out_features - top_);
  const int64_t width_ = std::min(plan_.block_cols, p_.in_features - left_);
  double total_ = 0.0;
};

template <typename T, typename W>
void score_blocks(const LinearSensitivityParams& p, int threads) {
  const Plan plan(p);
  const SumSlots slots = plan.slots(p);
  uint32_t* scratches = reinterpret_cast<uint32_t*>(
      static_cast<char*>(p.workspace) + round_up(slots.bytes, kLine * sizeof(uint32_t)));
  std::atomic<int64_t> next{0};
  parallel_for(threads, plan.workers(p, threads), [&](int64_t worker) {
    uint32_t* scratch = scratches + worker * plan.scratch;
    for (int64_t task; (task = next++) < plan.tasks;) {
      Block<T, W>(p, plan, slots, task, scratch).run();
    }
  });
  add_slots(p.sums, slots, p.out_features, p.in_features, threads);
}

}  // namespace

int64_t linear_sensitivity_workspace_cpu(const LinearSensitivityParams& p, int threads) {
  const Plan plan(p);
  return round_up(plan.slots(p).bytes, kLine * sizeof(uint32_t)) +
         plan.workers(p, threads) * plan.scratch * int64_t{sizeof(uint32_t)};
}

void linear_sensitivity_cpu(const LinearSensitivityParams& p, int threads) {
  with_float_type(p.dtype, [&](auto value) {
    with_float_type(p.weight_dtype, [&](auto weight) {
      score_blocks<decltype(value), decltype(weight)>(p, threads);
    });
  });
}

}  // namespace pkt
