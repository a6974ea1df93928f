// SPDX-License-Identifier: Apache-2.0
// score += |weight * grad| on the CPU.
//
// A task is a tile of 64 rows. They are 8192 elements long, or the prefetcher starts anew at every
// row; 1024 where an operand is strided, so that a transposed one's cache lines stay until all the
// rows that share them have used them; and longer where there are fewer. A row goes through the L1
// by 1024 elements: products, scores, sums. Every tile has its own slots for the sums, so the order
// of additions depends on shapes and strides alone.
// Bound: memory, 12 bytes an element with 16-bit operands and 16 with float32.
#include <algorithm>
#include <cmath>

#include "core/parallel.h"
#include "sensitivity/sums_cpu.h"

namespace pkt {
namespace {

constexpr int64_t kTall = kSumBlock;        // rows of a tile at most
constexpr int64_t kWide = 1024;             // elements of a row at a time
constexpr int64_t kTileElements = 1 << 16;  // at least, which is also worth waking a thread for
constexpr int64_t kLong = 8;                // times kWide: rows that the prefetcher follows

// out[j] = |weight[j] * grad[j]|
template <typename W, typename G>
PKT_SIMD_CLONES void multiply(float* out, const W* weight, int64_t weight_stride, const G* grad,
                              int64_t grad_stride, int64_t count) {
  if (weight_stride == 1 && grad_stride == 1) {
    for (int64_t j = 0; j < count; ++j) {
      out[j] = std::fabs(to_float(weight[j]) * to_float(grad[j]));
    }
  } else {
    for (int64_t j = 0; j < count; ++j) {
      out[j] = std::fabs(to_float(weight[j * weight_stride]) * to_float(grad[j * grad_stride]));
    }
  }
}

struct Tiles {
  int64_t width, across, down;

  explicit Tiles(const AccumulateSensitivityParams& p) {
    const bool streams = p.weight_col_stride == 1 && p.grad_col_stride == 1;
    const int64_t narrow = kTileElements / (std::min(p.rows, kTall) * kWide);
    width = std::max(narrow, streams ? kLong : 1) * kWide;
    across = ceil_div(p.cols, width);
    down = ceil_div(p.rows, kTall);
  }
};

template <typename W, typename G>
void add_tile(const AccumulateSensitivityParams& p, const SumSlots& slots, int64_t tile_row,
              int64_t tile_col, int64_t width) {
  const W* weight = static_cast<const W*>(p.weight);
  const G* grad = static_cast<const G*>(p.grad);
  const int64_t top = tile_row * kTall, bottom = std::min(top + kTall, p.rows);
  const int64_t left = tile_col * width, right = std::min(left + width, p.cols);
  double* cols = slots.cols ? slots.cols + tile_row * p.cols : nullptr;
  if (cols) std::fill(cols + left, cols + right, 0.0);
  double blocks[kTileElements / kSumBlock] = {};
  double total = 0.0;
  bool special = false;
  for (int64_t row = top; row < bottom; ++row) {
    double row_sum = 0.0;
    for (int64_t col = left; col < right; col += kWide) {
      const int64_t count = std::min(kWide, right - col);
      float products[kWide];
      multiply(products, weight + row * p.weight_row_stride + col * p.weight_col_stride,
               p.weight_col_stride, grad + row * p.grad_row_stride + col * p.grad_col_stride,
               p.grad_col_stride, count);
      special |=
          add_contributions(p.score ? p.score + row * p.cols + col : nullptr, products, count);
      if (!p.sums.any_sum()) continue;
      row_sum +=
          tally(products, count, blocks + (col - left) / kSumBlock, cols ? cols + col : nullptr);
    }
    if (slots.rows) slots.rows[tile_col * p.rows + row] = row_sum;
    total += row_sum;
  }
  if (p.sums.blocks) {
    double* out = p.sums.blocks + tile_row * ceil_div(p.cols, kSumBlock) + left / kSumBlock;
    for (int64_t i = 0; i < ceil_div(right - left, kSumBlock); ++i) out[i] += blocks[i];
  }
  if (slots.totals) slots.totals[tile_row * slots.row_slots + tile_col] = total;
  if (special) raise_flag(p.sums.nonfinite);
}

SumSlots slots_of(const AccumulateSensitivityParams& p, const Tiles& tiles) {
  return SumSlots(p.sums, p.rows, p.cols, tiles.across, tiles.down, p.workspace);
}

}  // namespace

int64_t accumulate_sensitivity_workspace_cpu(const AccumulateSensitivityParams& p) {
  return slots_of(p, Tiles(p)).bytes;
}

void accumulate_sensitivity_cpu(const AccumulateSensitivityParams& p, int threads) {
  const Tiles tiles(p);
  const SumSlots slots = slots_of(p, tiles);
  with_float_type(p.weight_dtype, [&](auto weight) {
    with_float_type(p.grad_dtype, [&](auto grad) {
      parallel_for(threads, tiles.across * tiles.down, [&](int64_t task) {
        add_tile<decltype(weight), decltype(grad)>(p, slots, task / tiles.across,
                                                   task % tiles.across, tiles.width);
      });
    });
  });
  add_slots(p.sums, slots, p.rows, p.cols, threads);
}

}  // namespace pkt
