// SPDX-License-Identifier: Apache-2.0
// Cholesky factor and its inverse on the CPU: a task a matrix, rows subtracted from rows, so that
// the inner loop is a vector multiply-add. Fixed order: equal bits on any thread count. Bound:
// load and store of those rows, from L1 up to size 64.
#include <algorithm>
#include <cmath>
#include <vector>

#include "core/parallel.h"
#include "small_svd/small_svd.h"

namespace pkt {
namespace {

// out[0:count] -= factor * row[0:count]
PKT_SIMD_CLONES void subtract(double* out, const double* row, double factor, int64_t count) {
  for (int64_t j = 0; j < count; ++j) out[j] -= factor * row[j];
}

// upper = L^T of gram = L L^T; the smallest pivot, as CholeskyInverseParams has it.
double factorise(const double* gram, double* upper, int64_t n) {
  double residue = 0.0;  // NaN once an entry is not finite
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      upper[j * n + i] = gram[i * n + j];
      residue += gram[i * n + j] - gram[i * n + j];
    }
  }
  if (residue != 0.0) return residue;
  double smallest = INFINITY;
  for (int64_t k = 0; k < n; ++k) {
    double* row = upper + k * n;
    if (!(row[k] > 0.0)) return 0.0;
    const double pivot = std::sqrt(row[k]);
    smallest = std::min(smallest, pivot);
    for (int64_t j = k; j < n; ++j) row[j] = j == k ? pivot : row[j] / pivot;
    for (int64_t i = k + 1; i < n; ++i) subtract(upper + i * n + i, row + i, row[i], n - i);
  }
  return smallest;
}

// inverse = lower^-1, lower being given transposed; zero above the diagonal.
void invert(const double* upper, double* inverse, int64_t n) {
  std::fill(inverse, inverse + n * n, 0.0);
  for (int64_t i = 0; i < n; ++i) {
    double* row = inverse + i * n;
    row[i] = 1.0;
    for (int64_t k = 0; k < i; ++k) subtract(row, inverse + k * n, upper[k * n + i], k + 1);
    for (int64_t j = 0; j <= i; ++j) row[j] /= upper[i * n + i];
  }
}

}  // namespace

void cholesky_inverse_cpu(const CholeskyInverseParams& p, int threads) {
  const int64_t n = p.size;
  std::vector<double> uppers(static_cast<size_t>(p.batch * n * n));
  parallel_for(threads, p.batch, [&](int64_t at) {
    double* upper = uppers.data() + at * n * n;
    double* lower = p.lower + at * n * n;
    double* inverse = p.inverse + at * n * n;
    p.pivot[at] = factorise(p.gram + at * n * n, upper, n);
    if (p.pivot[at] > 0.0) {
      invert(upper, inverse, n);
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < n; ++j) lower[i * n + j] = j <= i ? upper[j * n + i] : 0.0;
      }
    } else {
      std::fill(lower, lower + n * n, NAN);
      std::fill(inverse, inverse + n * n, NAN);
    }
  });
}

}  // namespace pkt
