// SPDX-License-Identifier: Apache-2.0
// Sensitivity |weight * gradient| (Seeking, arXiv 2310.11451; METHODS equations S1 and S2).
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace pkt {

constexpr int64_t kSumBlock = 64;  // side of the blocks of `SensitivitySums::blocks`

// What a call's contributions are added to beside or instead of the score; each may be null. A
// contribution is the float32 value that one call adds to one score. Added in float64, in an order
// that depends on shapes alone.
struct SensitivitySums {
  double* rows;    // [rows of the score]
  double* cols;    // [columns of the score]
  double* blocks;  // [ceil(rows / 64), ceil(columns / 64)], row-major
  double* total;   // [1]
  // [1]; becomes 1, and never 0, when a contribution, or the score it was added to, is NaN or
  // infinite.
  int32_t* nonfinite;

  PKT_HOST_DEVICE bool any_sum() const { return rows || cols || blocks || total; }
};

// score += |weight * grad|, the product in float32.
struct AccumulateSensitivityParams {
  float* score;        // [rows, cols], contiguous; null: only the sums
  const void* weight;  // [rows, cols]
  const void* grad;    // [rows, cols]
  DType weight_dtype, grad_dtype;
  int64_t rows, cols;
  int64_t weight_row_stride, weight_col_stride;  // in elements, as all strides
  int64_t grad_row_stride, grad_col_stride;
  SensitivitySums sums;
  void* workspace;  // accumulate_sensitivity_workspace_*() bytes, 256-byte aligned
};

// score += |weight| * sum over segments n of |grad_outputs[n]^T inputs[n]|, where [n] selects the
// rows segments[n] <= row < segments[n + 1]. Sums in float32, rows and segments in ascending order
// (of 16 rows at a time on the tensor cores, whose rounding within them is their own).
struct LinearSensitivityParams {
  float* score;              // [out_features, in_features], contiguous; null: only the sums
  const void* weight;        // [out_features, in_features]
  const void* inputs;        // [rows, in_features] of `dtype`
  const void* grad_outputs;  // [rows, out_features] of `dtype`
  const int64_t* segments;   // [segment_count + 1], ascending, where the kernel runs
  DType weight_dtype, dtype;
  int64_t rows, in_features, out_features, segment_count;
  int64_t weight_row_stride, weight_col_stride;
  int64_t inputs_row_stride, inputs_col_stride;
  int64_t grads_row_stride, grads_col_stride;
  SensitivitySums sums;
  // Which compiled variant runs; -1 is the best one, the others are there for the tests.
  // CPU: 0 baseline, 1 AVX2, 2 AVX-512, 3 AVX512_BF16 for bfloat16 operands (lowered to what the
  // machine and dtype have).
  // CUDA: 0 and 1 float32 FMA with tiles of 64 and 128; 2 tensor cores, where float32 is the sum of
  // two bfloat16 (linear_split_cuda.cu has the error); -1 is 2 on a device that has them.
  // 3 is wgmma on sm_90a, where operands and device are fit for it, else 2.
  int variant;
  void* workspace;  // linear_sensitivity_workspace_*() bytes, 256-byte aligned
};

// Bytes of workspace; nothing in it needs to be set.
int64_t accumulate_sensitivity_workspace_cpu(const AccumulateSensitivityParams& params);
int64_t accumulate_sensitivity_workspace_cuda(const AccumulateSensitivityParams& params);
int64_t linear_sensitivity_workspace_cpu(const LinearSensitivityParams& params, int threads);
int64_t linear_sensitivity_workspace_cuda(const LinearSensitivityParams& params);

void accumulate_sensitivity_cpu(const AccumulateSensitivityParams& params, int threads);
void accumulate_sensitivity_cuda(const AccumulateSensitivityParams& params, void* stream);
void linear_sensitivity_cpu(const LinearSensitivityParams& params, int threads);
// Offsets in `segments` that are not ascending or not in [0, rows] are clamped, not read past.
void linear_sensitivity_cuda(const LinearSensitivityParams& params, void* stream);

}  // namespace pkt
