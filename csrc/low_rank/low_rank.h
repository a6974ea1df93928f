// SPDX-License-Identifier: Apache-2.0
// What the truncated SVD needs around its GEMMs (KERNELS 5.3, 5.4): 16-bit slices of a thin float32
// factor, their products added up again, the finished factors' signs and scales, and on the CPU the
// products themselves.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace pkt {

// slices[lead + i, k * cols + j] = k-th 16-bit slice of values[i, j] * scale[j], k = 0, 1, 2: each
// rounds what the ones before it left over. All other rows of `slices` become zero.
struct SplitSlicesParams {
  const float* values;  // [rows, cols]
  const float* scale;   // [cols], powers of two
  void* slices;         // [slice_rows, 3 * cols] of `dtype`
  DType dtype;          // f16 or bf16
  int64_t rows, cols, slice_rows, lead;
};

// out[i, j] = sum over k, the smallest first, of parts[lead + i, k * cols + j] / scale[j].
struct MergeSlicesParams {
  const float* parts;  // [part_rows, 3 * cols]
  const float* scale;  // [cols], powers of two
  float* out;          // [rows, cols], lead + rows <= part_rows
  int64_t rows, cols, lead;
};

// In place, for each k: left[:, k] *= s * left_scale[k] and right[k, :] *= s * right_scale[k] where
// s = -1 if the first of left[:, k]'s entries of largest magnitude is negative, else 1.
struct OrientFactorsParams {
  void* left;               // [rows, rank] of `dtype`
  void* right;              // [rank, cols]
  const void* left_scale;   // [rank]
  const void* right_scale;  // [rank]
  DType dtype;              // f32 or f64
  int64_t rows, cols, rank;
};

// out = thin A^T (or thin A), or out += that, for a float32 `thin` factor, A widened in registers;
// CPU only, since cuBLAS does this at the memory's speed. Equal bits on any thread count.
struct ThinProductParams {
  const void* matrix;              // A [rows, cols] of `dtype`, each row contiguous
  const float* thin;               // [columns, transposed ? rows : cols], contiguous
  float* out;                      // [columns, transposed ? cols : rows], contiguous
  DType dtype;                     // f32, f16 or bf16
  int64_t rows, cols, row_stride;  // the stride in elements
  int64_t columns;                 // a multiple of 8
  bool transposed, accumulate;
  int variant;  // -1: the best this CPU has; 0: baseline, 1: AVX2, 2: AVX-512, or the next it has
};

// The sum of A's squares in float64, in an order that no thread count changes; CPU only.
struct SquareSumParams {
  const void* matrix;              // A [rows, cols] of `dtype`, each row contiguous
  DType dtype;                     // f32, f64, f16 or bf16
  int64_t rows, cols, row_stride;  // the stride in elements
};

double square_sum_cpu(const SquareSumParams& params, int threads);
void thin_product_cpu(const ThinProductParams& params, int threads);
void split_slices_cpu(const SplitSlicesParams& params, int threads);
void split_slices_cuda(const SplitSlicesParams& params, void* stream);
void merge_slices_cpu(const MergeSlicesParams& params, int threads);
void merge_slices_cuda(const MergeSlicesParams& params, void* stream);
void orient_factors_cpu(const OrientFactorsParams& params, int threads);
void orient_factors_cuda(const OrientFactorsParams& params, void* stream);

}  // namespace pkt
