// SPDX-License-Identifier: Apache-2.0
// Singular value decomposition by one-sided Jacobi on the CPU, a task a matrix: the steps of
// jacobi_cuda.cu, which explains them, one pair after the other. Columns are padded with zeros to
// whole vectors, sums have a fixed shape: equal bits on any thread count. Bound: multiply-adds on
// columns in L1 or L2; LAPACK's bidiagonalisation does fewer and is 2 to 8 times as fast, this is
// the reference for the kernel and for small values of graded matrices.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "core/parallel.h"
#include "small_svd/rotation.h"
#include "small_svd/small_svd.h"

namespace pkt {
namespace {

template <typename T>
constexpr int64_t kLanes = 64 / sizeof(T);

template <typename T>
struct Moments {
  T p2, q2, dot;
};

// Squares and inner product of p and q, `count` a multiple of kLanes; lane l sums every kLanes-th
// entry, then the lanes are added in order.
template <typename T>
PKT_SIMD_CLONES void take_moments(const T* p, const T* q, int64_t count, Moments<T>* out) {
  typedef T Lanes __attribute__((vector_size(64), aligned(sizeof(T))));
  Lanes p2 = {}, q2 = {}, dot = {};
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const Lanes x = *(const Lanes*)(p + i), y = *(const Lanes*)(q + i);
    p2 += x * x;
    q2 += y * y;
    dot += x * y;
  }
  *out = Moments<T>{};
  for (int64_t l = 0; l < kLanes<T>; ++l) {
    out->p2 += p2[l];
    out->q2 += q2[l];
    out->dot += dot[l];
  }
}

template <typename T>
PKT_SIMD_CLONES void turn_columns(const jacobi::Turn<T>* turn, T* p, T* q, int64_t count) {
  const jacobi::Turn<T> by = *turn;
  for (int64_t i = 0; i < count; ++i) jacobi::apply(by, p[i], q[i]);
}

// out += factor * row
template <typename T>
PKT_SIMD_CLONES void add(T* out, const T* row, T factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] += factor * row[i];
}

template <typename T>
T dot(const T* a, const T* b, int64_t count) {
  Moments<T> moments;
  take_moments(a, b, count, &moments);
  return moments.dot;
}

template <typename T>
struct Decomposition {
  int64_t rows, cols, row_pitch, col_pitch;
  std::vector<T> left;        // [cols, row_pitch]: the matrix, its reflections, Q, left vectors
  std::vector<T> right;       // [cols, col_pitch]: P R^T, later right vectors
  std::vector<T> lengths;     // [cols]
  std::vector<int64_t> slot;  // [cols]: the k-th pivot's column of `left`

  Decomposition(const T* matrix, int64_t rows_, int64_t cols_, T scale)
      : rows(rows_),
        cols(cols_),
        row_pitch(ceil_div(rows, kLanes<T>) * kLanes<T>),
        col_pitch(ceil_div(cols, kLanes<T>) * kLanes<T>),
        left(static_cast<size_t>(cols * row_pitch)),
        right(static_cast<size_t>(cols * col_pitch)),
        lengths(static_cast<size_t>(cols)),
        slot(static_cast<size_t>(cols)) {
    for (int64_t j = 0; j < cols; ++j) {
      for (int64_t i = 0; i < rows; ++i) left[j * row_pitch + i] = matrix[i * cols + j] * scale;
    }
    std::iota(slot.begin(), slot.end(), 0);
  }

  T* left_of(int64_t k) { return left.data() + slot[k] * row_pitch; }
  T* right_of(int64_t k) { return right.data() + k * col_pitch; }

  // The matrix is Q (P R^T)^T. A column keeps its reflection's vector, zero above its start.
  void triangularise() {
    std::vector<T> taus(static_cast<size_t>(cols));
    for (int64_t j = 0; j < cols; ++j) lengths[j] = dot(left_of(j), left_of(j), row_pitch);
    for (int64_t k = 0; k < cols; ++k) {
      int64_t pivot = k;
      for (int64_t l = k + 1; l < cols; ++l) {
        if (lengths[slot[l]] > lengths[slot[pivot]]) pivot = l;
      }
      std::swap(slot[k], slot[pivot]);
      T* v = left_of(k);
      const auto reflection = jacobi::reflection_of(v[k], lengths[slot[k]]);
      for (int64_t i = k; i < rows; ++i) v[i] = i == k ? T{1} : v[i] * reflection.rest;
      taus[k] = reflection.tau;
      right_of(k)[slot[k]] = reflection.beta;
      for (int64_t l = k + 1; l < cols; ++l) {
        T* column = left_of(l);
        add(column, v, -taus[k] * dot(v, column, row_pitch), row_pitch);
        right_of(k)[slot[l]] = column[k];
        column[k] = T{0};
        lengths[slot[l]] = dot(column, column, row_pitch);
      }
    }
    for (int64_t k = cols - 1; k >= 0; --k) {  // the reflections' product, last factor first
      T* v = left_of(k);
      for (int64_t l = k + 1; l < cols; ++l) {
        add(left_of(l), v, -taus[k] * dot(v, left_of(l), row_pitch), row_pitch);
      }
      for (int64_t i = k; i < rows; ++i) v[i] = (i == k ? T{1} : T{0}) - taus[k] * v[i];
    }
  }

  // Sweeps until one turns nothing; their number, or -1.
  int64_t orthogonalise() {
    const int players = static_cast<int>(cols);
    const T tolerance = jacobi::tolerance_of<T>(cols);
    for (int sweep = 1; sweep <= kSweeps; ++sweep) {
      bool turned = false;
      for (int round = 0; round < players; ++round) {
        for (int pair = 0; pair < players / 2; ++pair) {
          int p, q;
          if (!jacobi::meet(round, pair, players, p, q)) continue;
          Moments<T> moments;
          take_moments(right_of(p), right_of(q), col_pitch, &moments);
          jacobi::Turn<T> turn;
          if (!jacobi::turn_of(moments.p2, moments.q2, moments.dot, tolerance, turn)) continue;
          turn_columns(&turn, right_of(p), right_of(q), col_pitch);
          turn_columns(&turn, left_of(p), left_of(q), row_pitch);
          turned = true;
        }
      }
      if (!turned) return sweep;
    }
    return -1;
  }

  // Columns of length one, and `order`, by falling length; the number of those that are not zero.
  int64_t normalise(std::vector<int64_t>& order) {
    int64_t live = 0;
    for (int64_t k = 0; k < cols; ++k) {
      T* column = right_of(k);
      const T square = dot(column, column, col_pitch);
      lengths[k] = square < jacobi::Range<T>::kFloor ? T{0} : std::sqrt(square);
      live += lengths[k] > T{0};
      for (int64_t j = 0; j < cols; ++j) {
        column[j] = lengths[k] > T{0} ? column[j] / lengths[k] : T{0};
      }
    }
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
    return live;
  }

  // Right vector `order[count]` from the complement of those before it: the unit vector that lies
  // nearest to the complement, its part in their span removed twice.
  void complete(const std::vector<int64_t>& order, int64_t count) {
    std::vector<T> outside(static_cast<size_t>(cols), T{1});
    for (int64_t k = 0; k < count; ++k) {
      const T* known = right_of(order[k]);
      for (int64_t j = 0; j < cols; ++j) outside[j] -= known[j] * known[j];
    }
    T* added = right_of(order[count]);
    added[std::max_element(outside.begin(), outside.end()) - outside.begin()] = T{1};
    std::vector<T> inside(static_cast<size_t>(count));
    for (int round = 0; round < 2; ++round) {
      for (int64_t k = 0; k < count; ++k) inside[k] = dot(right_of(order[k]), added, col_pitch);
      for (int64_t k = 0; k < count; ++k) add(added, right_of(order[k]), -inside[k], col_pitch);
    }
    const T length = std::sqrt(dot(added, added, col_pitch));
    for (int64_t j = 0; j < cols; ++j) added[j] /= length;
  }

  void store(const std::vector<int64_t>& order, T scale, T* out_left, T* out_values, T* out_right) {
    for (int64_t k = 0; k < cols; ++k) {
      const T* from = left_of(order[k]);
      const T peak =
          *std::max_element(from, from + rows, [](T a, T b) { return std::abs(a) < std::abs(b); });
      const T sign = peak < T{0} ? T{-1} : T{1};
      for (int64_t i = 0; i < rows; ++i) out_left[i * cols + k] = sign * from[i];
      for (int64_t j = 0; j < cols; ++j) out_right[k * cols + j] = sign * right_of(order[k])[j];
      out_values[k] = lengths[order[k]] / scale;
    }
  }
};

template <typename T>
void decompose(const SmallSvdParams& p, int64_t at) {
  const int64_t count = p.rows * p.cols;
  const T* matrix = static_cast<const T*>(p.matrix) + at * count;
  T* left = static_cast<T*>(p.left) + at * count;
  T* values = static_cast<T*>(p.values) + at * p.cols;
  T* right = static_cast<T*>(p.right) + at * p.cols * p.cols;
  T peak{0}, residue{0};  // the latter NaN once an entry is not finite
  for (int64_t i = 0; i < count; ++i) {
    peak = std::max(peak, std::abs(matrix[i]));
    residue += matrix[i] - matrix[i];
  }
  if (residue != T{0}) {
    std::fill(left, left + count, static_cast<T>(NAN));
    std::fill(values, values + p.cols, static_cast<T>(NAN));
    std::fill(right, right + p.cols * p.cols, static_cast<T>(NAN));
    p.sweeps[at] = -1;
    return;
  }
  const T scale = jacobi::scale_of(peak);
  Decomposition<T> work(matrix, p.rows, p.cols, scale);
  std::vector<int64_t> order(static_cast<size_t>(p.cols));
  work.triangularise();
  p.sweeps[at] = work.orthogonalise();
  for (int64_t k = work.normalise(order); k < p.cols; ++k) work.complete(order, k);
  work.store(order, scale, left, values, right);
}

}  // namespace

void small_svd_cpu(const SmallSvdParams& p, int threads) {
  switch (p.dtype) {
    case DType::f32:
      return parallel_for(threads, p.batch, [&](int64_t at) { decompose<float>(p, at); });
    case DType::f64:
      return parallel_for(threads, p.batch, [&](int64_t at) { decompose<double>(p, at); });
    default:
      throw std::logic_error("small_svd: dtype the binding does not admit");
  }
}

}  // namespace pkt
