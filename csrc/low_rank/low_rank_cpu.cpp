// SPDX-License-Identifier: Apache-2.0
// The glue around the truncated SVD's products: one read and one write of the thin factors,
// negligible beside them.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "core/parallel.h"
#include "low_rank/low_rank.h"

namespace pkt {
namespace {

constexpr int64_t kRowChunk = 256;  // rows per task: thin factors of 32 columns fill 32 KiB

template <typename T>
PKT_SIMD_CLONES void split_row(const float* values, const float* scale, T* slices, int64_t cols) {
  for (int64_t j = 0; j < cols; ++j) {
    float rest = values[j] * scale[j];
    for (int k = 0; k < 3; ++k) {
      from_float(rest, slices[k * cols + j]);
      rest -= to_float(slices[k * cols + j]);
    }
  }
}

template <typename T>
void split(const SplitSlicesParams& p, int threads) {
  T* slices = static_cast<T*>(p.slices);
  parallel_for(threads, ceil_div(p.slice_rows, kRowChunk), [&](int64_t chunk) {
    const int64_t last = std::min(p.slice_rows, (chunk + 1) * kRowChunk);
    for (int64_t i = chunk * kRowChunk; i < last; ++i) {
      T* row = slices + i * 3 * p.cols;
      const int64_t from = i - p.lead;
      if (from < 0 || from >= p.rows) {
        std::fill(row, row + 3 * p.cols, T{});
      } else {
        split_row(p.values + from * p.cols, p.scale, row, p.cols);
      }
    }
  });
}

PKT_SIMD_CLONES void merge_row(const float* parts, const float* scale, float* out, int64_t cols) {
  for (int64_t j = 0; j < cols; ++j) {
    out[j] = ((parts[2 * cols + j] + parts[cols + j]) + parts[j]) / scale[j];
  }
}

template <typename T>
PKT_SIMD_CLONES void scale_row(T* row, T factor, int64_t count) {
  for (int64_t j = 0; j < count; ++j) row[j] *= factor;
}

template <typename T>
void orient(const OrientFactorsParams& p, int threads) {
  T* left = static_cast<T*>(p.left);
  T* right = static_cast<T*>(p.right);
  parallel_for(threads, p.rank, [&](int64_t k) {
    T peak = 0;
    for (int64_t i = 0; i < p.rows; ++i) {
      const T value = left[i * p.rank + k];
      if (std::abs(value) > std::abs(peak)) peak = value;
    }
    const T sign = peak < 0 ? T{-1} : T{1};
    const T on_left = sign * static_cast<const T*>(p.left_scale)[k];
    for (int64_t i = 0; i < p.rows; ++i) left[i * p.rank + k] *= on_left;
    scale_row(right + k * p.cols, sign * static_cast<const T*>(p.right_scale)[k], p.cols);
  });
}

constexpr int64_t kSumLanes = 32;

template <typename T>
PKT_SIMD_CLONES void add_squares(double* sums, const T* row, int64_t count) {
  double lanes[kSumLanes] = {};
  for (; count >= kSumLanes; count -= kSumLanes, row += kSumLanes) {
    for (int64_t j = 0; j < kSumLanes; ++j) lanes[j] += to_double(row[j]) * to_double(row[j]);
  }
  for (int64_t j = 0; j < count; ++j) lanes[j] += to_double(row[j]) * to_double(row[j]);
  for (int64_t j = 0; j < kSumLanes; ++j) sums[j] += lanes[j];
}

template <typename T>
double sum_squares(const SquareSumParams& p, int threads) {
  const T* matrix = static_cast<const T*>(p.matrix);
  std::vector<double> chunks(ceil_div(p.rows, kRowChunk));
  parallel_for(threads, static_cast<int64_t>(chunks.size()), [&](int64_t chunk) {
    double sums[kSumLanes] = {};
    const int64_t last = std::min(p.rows, (chunk + 1) * kRowChunk);
    for (int64_t i = chunk * kRowChunk; i < last; ++i) {
      add_squares(sums, matrix + i * p.row_stride, p.cols);
    }
    chunks[chunk] = std::accumulate(sums, sums + kSumLanes, 0.0);
  });
  return std::accumulate(chunks.begin(), chunks.end(), 0.0);
}

}  // namespace

double square_sum_cpu(const SquareSumParams& p, int threads) {
  if (p.dtype == DType::f32) return sum_squares<float>(p, threads);
  if (p.dtype == DType::f64) return sum_squares<double>(p, threads);
  if (p.dtype == DType::f16) return sum_squares<half>(p, threads);
  if (p.dtype == DType::bf16) return sum_squares<bfloat16>(p, threads);
  throw std::logic_error("square_sum: dtype the binding does not admit");
}

void split_slices_cpu(const SplitSlicesParams& p, int threads) {
  if (p.dtype == DType::f16) return split<half>(p, threads);
  if (p.dtype == DType::bf16) return split<bfloat16>(p, threads);
  throw std::logic_error("split_slices: dtype the binding does not admit");
}

void merge_slices_cpu(const MergeSlicesParams& p, int threads) {
  parallel_for(threads, ceil_div(p.rows, kRowChunk), [&](int64_t chunk) {
    const int64_t last = std::min(p.rows, (chunk + 1) * kRowChunk);
    for (int64_t i = chunk * kRowChunk; i < last; ++i) {
      merge_row(p.parts + (p.lead + i) * 3 * p.cols, p.scale, p.out + i * p.cols, p.cols);
    }
  });
}

void orient_factors_cpu(const OrientFactorsParams& p, int threads) {
  if (p.dtype == DType::f32) return orient<float>(p, threads);
  if (p.dtype == DType::f64) return orient<double>(p, threads);
  throw std::logic_error("orient_factors: dtype the binding does not admit");
}

}  // namespace pkt
