// SPDX-License-Identifier: Apache-2.0
// Small kernels with faults that can be planted, to show that the emulation finds them.
#pragma once

#include <cstdint>
#include <string>

namespace planted {

enum class Fault {
  none,
  missing_barrier,
  tail_off_by_one,
  out_of_range_read,
  partial_barrier,
  missing_wait,
  short_wait,
  abandoned_copy,
  early_copy,
  swapped_fragments,
  divergent_warp,
  box_not_waited,
  sums_not_waited,
  endless_barrier,
  wrong_descriptor,
};

Fault fault_of(const std::string& name);

// out = each run of 64 values of `values` [count] reversed (the last run may be shorter), plus the
// sum of its warp's values times zero, so that a shuffle takes part.
void reverse_tiles(const float* values, float* out, int64_t count, Fault fault);

// out [16, 16] += the sum over i of a[i]^T b[i], or a[i] b[i] where not `transposed`, on the tensor
// cores; a and b are [2, 16, 16], copied asynchronously one i after the other.
template <typename T>
void multiply(const T* a, const T* b, float* out, bool transposed, Fault fault);

// out [64, 192] = a^T b from a [16, 64] and b [16, 192], copied by boxes and multiplied by a
// warpgroup.
template <typename T>
void multiply_boxes(const T* a, const T* b, float* out, Fault fault);

}  // namespace planted
