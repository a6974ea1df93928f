// SPDX-License-Identifier: Apache-2.0
// Where a call keeps its tiles' partial sums until they are added, slot after slot, to the
// caller's.
#pragma once

#include <cstdint>

#include "sensitivity/sensitivity.h"

namespace pkt {

struct SumSlots {
  int64_t row_slots, col_slots;  // slots of a row's sum, of a column's sum
  double* rows = nullptr;        // [row_slots, rows]; null where the sum is not asked for, as all
  double* cols = nullptr;        // [col_slots, cols]
  double* totals = nullptr;      // [col_slots, row_slots]
  int64_t bytes = 0;             // of workspace

  // Tiles of a [rows, cols] score: `across` in a row of tiles, `down` in a column of them.
  SumSlots(const SensitivitySums& sums, int64_t rows, int64_t cols, int64_t across, int64_t down,
           void* workspace)
      : row_slots(across), col_slots(down) {
    const auto take = [&](bool wanted, int64_t count) -> double* {
      if (!wanted) return nullptr;
      bytes += count * int64_t{sizeof(double)};
      return workspace ? static_cast<double*>(workspace) + bytes / sizeof(double) - count : nullptr;
    };
    this->rows = take(sums.rows != nullptr, row_slots * rows);
    this->cols = take(sums.cols != nullptr, col_slots * cols);
    totals = take(sums.total != nullptr, row_slots * col_slots);
  }
};

}  // namespace pkt
