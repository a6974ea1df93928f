// SPDX-License-Identifier: Apache-2.0
// Where a call keeps its tiles' partial sums until they are added, slot after slot, to the
// caller's.
#pragma once

#include <cstdint>

#include "sensitivity/sensitivity.h"

namespace pkt {

struct SumSlots {
  int64_t row_slots, col_slots, total_slots;  // of one row's sum, one column's sum, the total
  double* rows = nullptr;    // [row_slots, rows]; null where the sum is not asked for, as all
  double* cols = nullptr;    // [col_slots, cols]
  double* totals = nullptr;  // [total_slots]
  int64_t bytes = 0;         // of workspace

  // For a [row_count, col_count] score. A null workspace: only `bytes` is of use.
  SumSlots(const SensitivitySums& sums, int64_t row_count, int64_t col_count, int64_t slots_of_row,
           int64_t slots_of_col, int64_t slots_of_total, void* workspace)
      : row_slots(slots_of_row), col_slots(slots_of_col), total_slots(slots_of_total) {
    int64_t used = 0;
    const auto take = [&](bool wanted, int64_t count) {
      double* slots = wanted && workspace ? static_cast<double*>(workspace) + used : nullptr;
      if (wanted) used += count;
      return slots;
    };
    rows = take(sums.rows, row_slots * row_count);
    cols = take(sums.cols, col_slots * col_count);
    totals = take(sums.total, total_slots);
    bytes = used * int64_t{sizeof(double)};
  }

  // The score is cut into `across` x `down` tiles, each with its own slots.
  SumSlots(const SensitivitySums& sums, int64_t row_count, int64_t col_count, int64_t across,
           int64_t down, void* workspace)
      : SumSlots(sums, row_count, col_count, across, down, across * down, workspace) {}
};

}  // namespace pkt
