// SPDX-License-Identifier: Apache-2.0
// Dense algebra on batches of small matrices, which LAPACK's GPU counterparts take one by one: the
// Cholesky factor and its inverse (CholeskyQR), and the singular value decomposition (KERNELS 5.4).
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace pkt {

// Per matrix: gram = lower lower^T and inverse = lower^-1, both zero above the diagonal. Only
// gram's lower triangle is read. `pivot` is lower's smallest diagonal entry; 0 where a pivot was
// not positive and NaN where gram is not finite: then lower and inverse are NaN throughout.
struct CholeskyInverseParams {
  const double* gram;  // [batch, size, size]
  double* lower;       // [batch, size, size]
  double* inverse;     // [batch, size, size]
  double* pivot;       // [batch]
  int64_t batch, size;
};

// Per matrix: matrix = left diag(values) right, values descending, left's columns and right's rows
// orthonormal whatever the values, the first of the largest magnitudes in each left column
// positive. Values that are 1e-29 (float64: 1e-280) of the largest or less come out as zero.
// `sweeps` counts those taken, the last without a turn; -1 where kSweeps did not suffice and where
// the matrix is not finite: then all its results are NaN.
struct SmallSvdParams {
  const void* matrix;  // [batch, rows, cols] of `dtype`, rows >= cols
  void* left;          // [batch, rows, cols]
  void* values;        // [batch, cols]
  void* right;         // [batch, cols, cols]
  void* workspace;     // [batch, rows, cols] where small_svd_workspace_cuda asks for it, or null
  int64_t* sweeps;     // [batch]
  DType dtype;         // f32 or f64
  int64_t batch, rows, cols;
};

constexpr int kSweeps = 30;  // 5 to 11 are usual

void cholesky_inverse_cpu(const CholeskyInverseParams& params, int threads);
void cholesky_inverse_cuda(const CholeskyInverseParams& params, void* stream);
// Whether a matrix fits the current device's shared memory; on the CPU each does.
bool cholesky_inverse_fits_cuda(int64_t size);

void small_svd_cpu(const SmallSvdParams& params, int threads);
void small_svd_cuda(const SmallSvdParams& params, void* stream);
// Elements of workspace a matrix needs on the current device, or -1 where it does not fit or has
// 2^31 elements or about as many.
int64_t small_svd_workspace_cuda(const SmallSvdParams& params);

}  // namespace pkt
