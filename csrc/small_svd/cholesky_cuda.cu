// SPDX-License-Identifier: Apache-2.0
// Cholesky factor and its inverse, a block a matrix, float64, in one sweep over panels of kPanel
// columns. The packed lower triangle in shared memory starts as the Gram matrix; a panel's step
//   factor_panel   takes its columns of L, a thread a row, one barrier a column;
//   invert_panel   takes its rows of X = L^-1, a thread a column;
//   eliminate      subtracts the panel from all rows below it, on the right of the panel for the
//                  factor, on the left for the inverse: columns of L make room for those of X.
// 16 consecutive rows of a packed column lie in 16 different bank pairs (triangular numbers run
// through all residues), so nothing is padded: n = 150 fits 99 KB, 195 163 KB, 232 227 KB.
// Bound: latency. A column is a barrier, a square root and a division deep, n of them in a row;
// the 2 n^3 / 3 FLOP are a few microseconds at n = 64, also where float64 runs at 1/64 rate.
// Fixed order; a pivot that is not positive ends the matrix's work and is reported.
#include <cmath>

#include "core/cuda/launch.cuh"
#include "small_svd/small_svd.h"

namespace pkt {
namespace {

constexpr int kThreads = 256;  // a thread a row: the largest size
constexpr int kPanel = 8;
constexpr int kTile = 4;  // columns a thread takes in eliminate(); divides kPanel

__host__ __device__ __forceinline__ int packed(int i, int j) {
  return i * (i + 1) / 2 + j;
}

int64_t shared_bytes(int64_t size) {
  return (size * (size + 1) / 2 + kPanel * size + 1) * static_cast<int64_t>(sizeof(double));
}

struct Work {
  int size, first, width;  // the panel's first column, and how many it has
  double* triangle;        // packed
  double* panel;           // [kPanel, size]: L[i, first + k], later X[first + k, j] for its columns
};

// Thread i holds row i of the panel; `row` leaves with L's entries.
__device__ __forceinline__ void factor_panel(const Work& w, double (&row)[kPanel]) {
  const int i = threadIdx.x;
#pragma unroll
  for (int k = 0; k < kPanel; ++k) {
    const bool stored = i < w.size && k < w.width && w.first + k <= i;
    row[k] = stored ? w.triangle[packed(i, w.first + k)] : 0.0;
  }
#pragma unroll
  for (int j = 0; j < kPanel; ++j) {
    if (j >= w.width) break;
    const int diagonal = w.first + j;
    if (i == diagonal) {
      double rest = row[j];
#pragma unroll
      for (int k = 0; k < j; ++k) rest -= row[k] * row[k];
      row[j] = rest > 0.0 ? sqrt(rest) : 0.0;
#pragma unroll
      for (int k = 0; k <= j; ++k) w.panel[k * w.size + i] = row[k];
    }
    __syncthreads();
    if (i > diagonal && i < w.size) {
      double rest = row[j];
#pragma unroll
      for (int k = 0; k < j; ++k) rest -= row[k] * w.panel[k * w.size + diagonal];
      row[j] = rest / w.panel[j * w.size + diagonal];
    }
  }
  if (i >= w.first + w.width && i < w.size) {
#pragma unroll
    for (int k = 0; k < kPanel; ++k) w.panel[k * w.size + i] = row[k];
  }
}

// Thread j solves for column j of the panel's rows of X.
__device__ __forceinline__ void invert_panel(const Work& w, double (&x)[kPanel]) {
  const int j = threadIdx.x;
  const bool solved = j < w.first + w.width;
#pragma unroll
  for (int k = 0; k < kPanel; ++k) {
    const int i = w.first + k;
    x[k] = 0.0;
    if (!solved || k >= w.width) continue;
    double rest = j < w.first ? w.triangle[packed(i, j)] : (j == i ? 1.0 : 0.0);
#pragma unroll
    for (int l = 0; l < k; ++l) rest -= w.panel[l * w.size + i] * x[l];
    x[k] = rest / w.panel[k * w.size + i];
  }
  __syncthreads();  // the diagonal block has been read
  if (solved) {
#pragma unroll
    for (int k = 0; k < kPanel; ++k) w.panel[k * w.size + j] = x[k];
  }
}

// A warp takes 32 rows below the panel by kTile columns at a time.
__device__ __forceinline__ void eliminate(const Work& w) {
  const int below = w.first + w.width;
  const int row_groups = (w.size - below + 31) / 32;
  const int tiles = row_groups * ((w.size + kTile - 1) / kTile);
  for (int tile = threadIdx.x / 32; tile < tiles; tile += kThreads / 32) {
    const int i = below + tile % row_groups * 32 + static_cast<int>(threadIdx.x) % 32;
    const int column = tile / row_groups * kTile;
    if (i >= w.size || column > i) continue;
    double left[kPanel];
#pragma unroll
    for (int k = 0; k < kPanel; ++k) left[k] = w.panel[k * w.size + i];
    const bool fresh = column >= w.first && column < below;  // X starts where L ends
#pragma unroll
    for (int c = 0; c < kTile; ++c) {
      const int j = column + c;
      if (j > i) break;
      double sum = fresh ? 0.0 : w.triangle[packed(i, j)];
#pragma unroll
      for (int k = 0; k < kPanel; ++k) sum -= left[k] * w.panel[k * w.size + j];
      w.triangle[packed(i, j)] = sum;
    }
  }
}

// Copies the lower triangle to shared memory; whether all of it is finite.
__device__ __forceinline__ bool load(const double* gram, int size, double* triangle, double* flag) {
  bool finite = true;
  for (int at = threadIdx.x; at < size * size; at += kThreads) {
    const int i = at / size, j = at % size;
    if (j > i) continue;
    const double value = gram[at];
    finite = finite && value - value == 0.0;
    triangle[packed(i, j)] = value;
  }
  if (threadIdx.x == 0) *flag = 1.0;
  __syncthreads();
  if (!finite) *flag = 0.0;
  __syncthreads();
  return *flag == 1.0;
}

__global__ void __launch_bounds__(kThreads) cholesky_inverse(CholeskyInverseParams p) {
  const int size = static_cast<int>(p.size);
  double* shared = cuda::shared_memory<double>();
  Work w{size, 0, kPanel, shared, shared + packed(size, 0)};
  const int64_t base = int64_t{blockIdx.x} * size * size;
  double* lower = p.lower + base;
  double* inverse = p.inverse + base;
  const int mine = threadIdx.x;

  const bool finite = load(p.gram + base, size, w.triangle, w.panel + kPanel * size);
  double smallest = finite ? INFINITY : NAN;
  for (; w.first < size && smallest > 0.0; w.first += kPanel) {
    w.width = size - w.first < kPanel ? size - w.first : kPanel;
    double values[kPanel];
    factor_panel(w, values);
    for (int k = 0; k < w.width; ++k) {
      smallest = fmin(smallest, w.panel[k * size + w.first + k]);
      const int j = w.first + k;
      if (mine < size) lower[int64_t{mine} * size + j] = j <= mine ? values[k] : 0.0;
    }
    __syncthreads();
    invert_panel(w, values);
    for (int k = 0; k < w.width; ++k) {
      if (mine < size) inverse[int64_t{w.first + k} * size + mine] = values[k];
    }
    __syncthreads();
    eliminate(w);
    __syncthreads();
  }

  if (threadIdx.x == 0) p.pivot[blockIdx.x] = smallest;
  if (smallest > 0.0) return;
  for (int at = threadIdx.x; at < size * size; at += kThreads) lower[at] = inverse[at] = NAN;
}

}  // namespace

bool cholesky_inverse_fits_cuda(int64_t size) {
  return size <= kThreads && shared_bytes(size) <= cuda::shared_memory_limit();
}

void cholesky_inverse_cuda(const CholeskyInverseParams& p, void* stream) {
  cuda::launch(cholesky_inverse, dim3(static_cast<unsigned>(p.batch)), dim3(kThreads),
               static_cast<size_t>(shared_bytes(p.size)), static_cast<cudaStream_t>(stream), p);
}

}  // namespace pkt
