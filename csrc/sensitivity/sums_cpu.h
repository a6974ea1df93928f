// SPDX-License-Identifier: Apache-2.0
// What both sensitivities do on the CPU with a row of contributions once it is formed.
#pragma once

#include "sensitivity/sums.h"

namespace pkt {

// score[j] += contributions[j]; true when a new score is NaN or infinite. A null score: true when
// a contribution is.
bool add_contributions(float* score, const float* contributions, int64_t count);

// Returns the sum of contributions[j]; each 64 of them are added to one of `blocks` also, and each
// to one of `cols` unless that is null.
double tally(const float* contributions, int64_t count, double* blocks, double* cols);

// Safe from several threads.
inline void raise_flag(int32_t* nonfinite) {
  if (nonfinite) __atomic_store_n(nonfinite, 1, __ATOMIC_RELAXED);
}

// Adds the slots of the tiles to the sums of a [rows, cols] score, in ascending order.
void add_slots(const SensitivitySums& sums, const SumSlots& slots, int64_t rows, int64_t cols,
               int threads);

}  // namespace pkt
