// SPDX-License-Identifier: Apache-2.0
#include "sensitivity/sums_cpu.h"

#include <algorithm>

#include "core/parallel.h"

namespace pkt {
namespace {

uint32_t is_special(float value) {  // a mask rather than isfinite(), which GCC does not vectorise
  return (float_to_bits(value) & 0x7f800000u) == 0x7f800000u;
}

// sum[j] += slots[0][j] + slots[1][j] + ...
PKT_SIMD_CLONES void add_columns(double* sum, const double* slots, int64_t stride,
                                 int64_t slot_count, int64_t count) {
  for (int64_t slot = 0; slot < slot_count; ++slot) {
    for (int64_t j = 0; j < count; ++j) sum[j] += slots[slot * stride + j];
  }
}

void add_slots(double* sum, const double* slots, int64_t slot_count, int64_t count, int threads) {
  constexpr int64_t kWide = 1024;  // sums, 8 KiB: they stay in the L1 while the slots pass
  if (!sum) return;
  parallel_for(
      slot_count * count < 1 << 16 ? 1 : threads, ceil_div(count, kWide), [&](int64_t task) {
        const int64_t first = task * kWide;
        add_columns(sum + first, slots + first, count, slot_count, std::min(kWide, count - first));
      });
}

}  // namespace

PKT_SIMD_CLONES bool add_contributions(float* score, const float* contributions, int64_t count) {
  uint32_t special = 0;
  if (score) {
    for (int64_t j = 0; j < count; ++j) {
      score[j] += contributions[j];
      special |= is_special(score[j]);
    }
  } else {
    for (int64_t j = 0; j < count; ++j) special |= is_special(contributions[j]);
  }
  return special;
}

PKT_SIMD_CLONES double tally(const float* contributions, int64_t count, double* blocks,
                             double* cols) {
  constexpr int64_t kLanes = 16;  // fixed counts throughout, or the loops are not vectorised well
  double all = 0.0;
  for (int64_t left = 0; left < count; left += kSumBlock) {
    const float* c = contributions + left;
    float last[kSumBlock];
    const bool ragged = left + kSumBlock > count;
    if (ragged) {
      for (int64_t j = 0; j < kSumBlock; ++j) last[j] = left + j < count ? c[j] : 0.0f;
      c = last;
    }
    double lanes[kLanes] = {};
    for (int64_t j = 0; j < kSumBlock; j += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += c[j + lane];
    }
    double four[4];
    for (int64_t lane = 0; lane < 4; ++lane) {
      four[lane] = (lanes[lane] + lanes[lane + 8]) + (lanes[lane + 4] + lanes[lane + 12]);
    }
    const double sum = (four[0] + four[2]) + (four[1] + four[3]);
    blocks[left / kSumBlock] += sum;
    all += sum;
    if (!cols) continue;
    if (ragged) {
      for (int64_t j = 0; left + j < count; ++j) cols[left + j] += c[j];
    } else {
      for (int64_t j = 0; j < kSumBlock; ++j) cols[left + j] += c[j];
    }
  }
  return all;
}

void add_slots(const SensitivitySums& sums, const SumSlots& slots, int64_t rows, int64_t cols,
               int threads) {
  add_slots(sums.rows, slots.rows, slots.row_slots, rows, threads);
  add_slots(sums.cols, slots.cols, slots.col_slots, cols, threads);
  add_slots(sums.total, slots.totals, slots.total_slots, 1, 1);
}

}  // namespace pkt
