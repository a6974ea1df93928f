// SPDX-License-Identifier: Apache-2.0
// Singular value decomposition, a block a matrix, by one-sided Jacobi on a triangular factor:
//   triangularise   Householder QR with column pivoting, A P = Q R;
//   orthogonalise   pairs of columns of P R^T are turned until all are orthogonal, and those of Q
//                   with them: then A = (Q J) diag(s) (P R^T J / s)^T, J the product of the turns;
//   normalise       lengths are the singular values; a column of zeros gets its right vector from
//                   the complement of the others (complete), left vectors never need it.
// Source: Hestenes 1958; de Rijk 1989 (the longer column first); Demmel, Veselic 1992 and Drmac,
// Veselic 2008 (R^T of the pivoted QR: fewer sweeps, small values to high relative accuracy).
//
// A round's pairs are disjoint: a warp takes a pair, lanes the entries. Columns lie one after
// another in shared memory, P R^T always and Q where it fits, else in the workspace, which L2
// holds. Sums are trees of fixed shape: equal bits for equal input.
// Bound: shared memory traffic of `cols` rounds a sweep, each over all columns, for large matrices;
// a barrier and two chains of shuffles and roots a round for small ones.
// Tried and dropped (sweeps at 128 columns, float64): the matrix itself instead of R^T (11 to 23
// against 9); a round-robin tournament, which does not tolerate that columns change places (11 to
// 15 without, over 30 with); a rotation by its cosine, whose rounding lengthens the columns of Q by
// 1e-4 in float32 over the turns of a decomposition.
#include <cmath>
#include <limits>
#include <stdexcept>

#include "core/cuda/reduce.cuh"
#include "small_svd/rotation.h"
#include "small_svd/small_svd.h"

namespace pkt {
namespace {

using cuda::warp_sum;

constexpr int kMaxWarps = 27;  // the 80 pairs of 160 columns in three turns, 72 registers a thread

// The parts of a block's memory; `left` may lie in the workspace.
template <typename T>
struct Work {
  int rows, cols;
  T* right;      // [cols, cols]: a column of P R^T, later a right vector, after the other
  T* left;       // [cols, rows]: the matrix, its reflections, Q, left vectors
  T* lengths;    // [cols]
  T* outside;    // [cols]
  T* aside;      // [max(cols, 32)]: partial results of one step
  int* slot;     // [cols]: the k-th pivot's column of `left`
  int* order;    // [cols]: columns by falling length
  int* rotated;  // [1]

  __device__ Work(const SmallSvdParams& p, T* shared)
      : rows(static_cast<int>(p.rows)), cols(static_cast<int>(p.cols)), right(shared) {
    T* next = right + cols * cols;
    left = static_cast<T*>(p.workspace) + int64_t{blockIdx.x} * rows * cols;
    if (p.workspace == nullptr) {
      left = next;
      next += rows * cols;
    }
    lengths = next;
    outside = lengths + cols;
    aside = outside + cols;
    slot = reinterpret_cast<int*>(aside + (cols < 32 ? 32 : cols));
    order = slot + cols;
    rotated = order + cols;
  }

  __device__ T* left_of(int k) const { return left + slot[k] * rows; }
  __device__ T* right_of(int k) const { return right + k * cols; }
};

int64_t shared_bytes(const SmallSvdParams& p, bool left) {
  const int64_t aside = p.cols < 32 ? 32 : p.cols;
  const int64_t values = p.cols * (p.cols + (left ? p.rows : 0)) + 2 * p.cols + aside;
  return values * (p.dtype == DType::f64 ? 8 : 4) + (2 * p.cols + 1) * 4;
}

__device__ __forceinline__ int warp_index() {
  return static_cast<int>(threadIdx.x) / 32;
}
__device__ __forceinline__ int warp_count() {
  return static_cast<int>(blockDim.x) / 32;
}
__device__ __forceinline__ int lane_index() {
  return static_cast<int>(threadIdx.x) % 32;
}

template <typename T>
__device__ __forceinline__ T warp_dot(const T* a, const T* b, int count) {
  T sum{0};
  for (int i = lane_index(); i < count; i += 32) sum += a[i] * b[i];
  return warp_sum(sum);
}

// The first of the largest of value(0), ..., value(count - 1), none negative; every lane gets it.
template <typename T, typename Value>
__device__ __forceinline__ int warp_peak(int count, const Value& value) {
  T peak{-1};
  int at = 0;
  for (int i = lane_index(); i < count; i += 32) {
    if (value(i) > peak) {
      peak = value(i);
      at = i;
    }
  }
  for (int bits = 16; bits > 0; bits /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, peak, bits);
    const int there = __shfl_xor_sync(0xffffffffu, at, bits);
    if (other > peak || (other == peak && there < at)) {
      peak = other;
      at = there;
    }
  }
  return at;
}

// The largest magnitude of the matrix, infinite where an entry is not finite.
template <typename T>
__device__ __forceinline__ T block_peak(const T* matrix, int count, T* scratch) {
  T peak{0};
  for (int at = threadIdx.x; at < count; at += blockDim.x) {
    const T magnitude = std::abs(matrix[at]);
    if (!(magnitude <= peak))
      peak = magnitude - magnitude == T{0} ? magnitude : static_cast<T>(INFINITY);
  }
  for (int bits = 16; bits > 0; bits /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, peak, bits);
    if (other > peak) peak = other;
  }
  if (lane_index() == 0) scratch[warp_index()] = peak;
  __syncthreads();
  for (int w = 0; w < warp_count(); ++w) {
    if (scratch[w] > peak) peak = scratch[w];
  }
  __syncthreads();
  return peak;
}

// column -= (v . column) tau v, by a warp
template <typename T>
__device__ __forceinline__ void reflect(T* column, const T* v, T tau, int count) {
  const T factor = tau * warp_dot(v, column, count);
  for (int i = lane_index(); i < count; i += 32) column[i] -= factor * v[i];
  __syncwarp();
}

// `left` becomes Q and `right` P R^T. A column keeps its reflection's vector meanwhile.
template <typename T>
__device__ __forceinline__ void triangularise(const Work<T>& w) {
  T* taus = w.aside;
  for (int j = threadIdx.x; j < w.cols; j += blockDim.x) w.slot[j] = j;
  for (int j = warp_index(); j < w.cols; j += warp_count()) {
    const T* column = w.left + j * w.rows;
    const T square = warp_dot(column, column, w.rows);
    if (lane_index() == 0) w.lengths[j] = square;
  }
  __syncthreads();
  for (int k = 0; k < w.cols; ++k) {
    const int pivot = k + warp_peak<T>(w.cols - k, [&](int l) { return w.lengths[w.slot[k + l]]; });
    __syncthreads();
    if (threadIdx.x == 0) {
      const int chosen = w.slot[pivot];
      w.slot[pivot] = w.slot[k];
      w.slot[k] = chosen;
    }
    __syncthreads();
    T* v = w.left_of(k) + k;  // rows above k belong to R and are in `right`
    const int count = w.rows - k;
    const auto reflection = jacobi::reflection_of(v[0], w.lengths[w.slot[k]]);
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      v[i] = i == 0 ? T{1} : v[i] * reflection.rest;
    }
    if (threadIdx.x == 0) {
      taus[k] = reflection.tau;
      w.right_of(k)[w.slot[k]] = reflection.beta;
    }
    __syncthreads();
    for (int l = k + 1 + warp_index(); l < w.cols; l += warp_count()) {
      T* column = w.left_of(l) + k;
      reflect(column, v, reflection.tau, count);
      const T square = warp_dot(column + 1, column + 1, count - 1);
      if (lane_index() == 0) {
        w.right_of(k)[w.slot[l]] = column[0];
        column[0] = T{0};
        w.lengths[w.slot[l]] = square;
      }
    }
    __syncthreads();
  }
  for (int k = w.cols - 1; k >= 0; --k) {  // the reflections' product, last factor first
    T* v = w.left_of(k) + k;
    const int count = w.rows - k;
    for (int l = k + 1 + warp_index(); l < w.cols; l += warp_count()) {
      reflect(w.left_of(l) + k, v, taus[k], count);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      v[i] = (i == 0 ? T{1} : T{0}) - taus[k] * v[i];
    }
    __syncthreads();
  }
}

// A warp makes columns p and q orthogonal; whether it had to.
template <typename T>
__device__ __forceinline__ bool turn_pair(const Work<T>& w, int p, int q, T tolerance) {
  T* right_p = w.right_of(p);
  T* right_q = w.right_of(q);
  T p2{0}, q2{0}, dot{0};
  for (int i = lane_index(); i < w.cols; i += 32) {
    const T x = right_p[i], y = right_q[i];
    p2 += x * x;
    q2 += y * y;
    dot += x * y;
  }
  p2 = warp_sum(p2);
  q2 = warp_sum(q2);
  dot = warp_sum(dot);
  jacobi::Turn<T> turn;
  if (!jacobi::turn_of(p2, q2, dot, tolerance, turn)) return false;
  for (int i = lane_index(); i < w.cols; i += 32) jacobi::apply(turn, right_p[i], right_q[i]);
  T* left_p = w.left_of(p);
  T* left_q = w.left_of(q);
  for (int i = lane_index(); i < w.rows; i += 32) jacobi::apply(turn, left_p[i], left_q[i]);
  return true;
}

// Sweeps until one turns nothing; their number, or -1.
template <typename T>
__device__ __forceinline__ int orthogonalise(const Work<T>& w) {
  const T tolerance = jacobi::tolerance_of<T>(w.cols);
  for (int sweep = 1; sweep <= kSweeps; ++sweep) {
    if (threadIdx.x == 0) *w.rotated = 0;
    __syncthreads();
    for (int round = 0; round < w.cols; ++round) {
      for (int pair = warp_index(); pair < w.cols / 2; pair += warp_count()) {
        int p, q;
        if (!jacobi::meet(round, pair, w.cols, p, q)) continue;
        if (turn_pair(w, p, q, tolerance) && lane_index() == 0) *w.rotated = 1;
      }
      __syncthreads();
    }
    const bool done = *w.rotated == 0;
    __syncthreads();
    if (done) return sweep;
  }
  return -1;
}

// Columns of length one, and the order their lengths give; the number of those that are not zero.
template <typename T>
__device__ __forceinline__ int normalise(const Work<T>& w) {
  for (int k = warp_index(); k < w.cols; k += warp_count()) {
    T* column = w.right_of(k);
    const T square = warp_dot(column, column, w.cols);
    const T length = square < jacobi::Range<T>::kFloor ? T{0} : std::sqrt(square);
    if (lane_index() == 0) w.lengths[k] = length;
    for (int j = lane_index(); j < w.cols; j += 32) {
      column[j] = length > T{0} ? column[j] / length : T{0};
    }
  }
  __syncthreads();
  int live = 0;
  for (int k = 0; k < w.cols; ++k) live += w.lengths[k] > T{0};
  for (int k = threadIdx.x; k < w.cols; k += blockDim.x) {
    int rank = 0;
    for (int l = 0; l < w.cols; ++l) {
      rank += w.lengths[l] > w.lengths[k] || (w.lengths[l] == w.lengths[k] && l < k);
    }
    w.order[rank] = k;
  }
  __syncthreads();
  return live;
}

// Right vector order[count] from the complement of those before it: the unit vector that lies
// nearest to the complement, its part in their span removed twice.
template <typename T>
__device__ __forceinline__ void complete(const Work<T>& w, int count) {
  T* added = w.right_of(w.order[count]);
  for (int j = threadIdx.x; j < w.cols; j += blockDim.x) {
    T outside{1};
    for (int k = 0; k < count; ++k) {
      const T entry = w.right_of(w.order[k])[j];
      outside -= entry * entry;
    }
    w.outside[j] = outside;
  }
  __syncthreads();
  const int nearest = warp_peak<T>(w.cols, [&](int j) { return w.outside[j]; });
  for (int j = threadIdx.x; j < w.cols; j += blockDim.x) added[j] = j == nearest ? T{1} : T{0};
  __syncthreads();
  for (int round = 0; round < 2; ++round) {
    for (int k = warp_index(); k < count; k += warp_count()) {
      const T inside = warp_dot(w.right_of(w.order[k]), added, w.cols);
      if (lane_index() == 0) w.aside[k] = inside;
    }
    __syncthreads();
    for (int j = threadIdx.x; j < w.cols; j += blockDim.x) {
      T rest = added[j];
      for (int k = 0; k < count; ++k) rest -= w.aside[k] * w.right_of(w.order[k])[j];
      added[j] = rest;
    }
    __syncthreads();
  }
  const T length = std::sqrt(warp_dot(added, added, w.cols));
  __syncthreads();
  for (int j = threadIdx.x; j < w.cols; j += blockDim.x) added[j] /= length;
  __syncthreads();
}

// Results of a matrix that is not finite.
template <typename T>
__device__ __forceinline__ void refuse(const SmallSvdParams& p, T* left, T* values, T* right) {
  for (int64_t at = threadIdx.x; at < p.rows * p.cols; at += blockDim.x) left[at] = NAN;
  for (int64_t at = threadIdx.x; at < p.cols; at += blockDim.x) values[at] = NAN;
  for (int64_t at = threadIdx.x; at < p.cols * p.cols; at += blockDim.x) right[at] = NAN;
  if (threadIdx.x == 0) p.sweeps[blockIdx.x] = -1;
}

template <typename T>
__global__ void __launch_bounds__(kMaxWarps * 32, 1) small_svd(SmallSvdParams p) {
  const Work<T> w(p, cuda::shared_memory<T>());
  const int64_t block = blockIdx.x;
  const T* matrix = static_cast<const T*>(p.matrix) + block * w.rows * w.cols;
  T* left = static_cast<T*>(p.left) + block * w.rows * w.cols;
  T* values = static_cast<T*>(p.values) + block * w.cols;
  T* right = static_cast<T*>(p.right) + block * w.cols * w.cols;

  const T peak = block_peak(matrix, w.rows * w.cols, w.aside);
  if (!(peak - peak == T{0})) return refuse(p, left, values, right);
  const T scale = jacobi::scale_of(peak);
  for (int at = threadIdx.x; at < w.rows * w.cols; at += blockDim.x) {
    w.left[at % w.cols * w.rows + at / w.cols] = matrix[at] * scale;
  }
  for (int at = threadIdx.x; at < w.cols * w.cols; at += blockDim.x) w.right[at] = T{0};
  __syncthreads();
  triangularise(w);
  const int sweeps = orthogonalise(w);
  for (int count = normalise(w); count < w.cols; ++count) complete(w, count);

  T* signs = w.aside;
  for (int k = warp_index(); k < w.cols; k += warp_count()) {
    const T* column = w.left_of(w.order[k]);
    const int peak = warp_peak<T>(w.rows, [&](int i) { return std::abs(column[i]); });
    if (lane_index() == 0) signs[k] = column[peak] < T{0} ? T{-1} : T{1};
  }
  __syncthreads();
  for (int at = threadIdx.x; at < w.rows * w.cols; at += blockDim.x) {
    const int k = at % w.cols;
    left[at] = signs[k] * w.left_of(w.order[k])[at / w.cols];
  }
  for (int at = threadIdx.x; at < w.cols * w.cols; at += blockDim.x) {
    const int k = at / w.cols;
    right[at] = signs[k] * w.right_of(w.order[k])[at % w.cols];
  }
  for (int k = threadIdx.x; k < w.cols; k += blockDim.x) {
    values[k] = w.lengths[w.order[k]] / scale;
  }
  if (threadIdx.x == 0) p.sweeps[block] = sweeps;
}

template <typename T>
void decompose(const SmallSvdParams& p, cudaStream_t stream) {
  const int64_t pairs = p.cols < 4 ? 1 : p.cols / 2;
  const auto warps = static_cast<unsigned>(pairs < kMaxWarps ? pairs : kMaxWarps);
  cuda::launch(small_svd<T>, dim3(static_cast<unsigned>(p.batch)), dim3(32 * warps),
               static_cast<size_t>(shared_bytes(p, p.workspace == nullptr)), stream, p);
}

}  // namespace

int64_t small_svd_workspace_cuda(const SmallSvdParams& p) {
  // the kernel counts a matrix's elements in 32 bits, one step of a block beyond the last
  if (p.rows * p.cols > std::numeric_limits<int>::max() - 32 * kMaxWarps) return -1;
  const int64_t limit = cuda::shared_memory_limit();
  if (shared_bytes(p, true) <= limit) return 0;
  return shared_bytes(p, false) <= limit ? p.rows * p.cols : -1;
}

void small_svd_cuda(const SmallSvdParams& p, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case DType::f32:
      return decompose<float>(p, on);
    case DType::f64:
      return decompose<double>(p, on);
    default:
      throw std::logic_error("small_svd: dtype the binding does not admit");
  }
}

}  // namespace pkt
