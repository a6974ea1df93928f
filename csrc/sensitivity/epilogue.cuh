// SPDX-License-Identifier: Apache-2.0
// How every sensitivity kernel on the GPU ends: a tile's contributions are added to the scores, and
// their sums formed on the way, in one pass with coalesced accesses.
//
// A tile is cut into strips of 64 columns, 16 threads by 4 columns: a row of a strip is 256 bytes
// of score. A thread keeps the sums of its columns; those of its rows it keeps across the strips.
//   - Rows: over the 16 threads by shuffles, into a slot for each tile that the row crosses.
//   - Columns: over the warps through shared memory, into a slot for each 64 rows.
//   - Blocks of 64 x 64: the sum of their columns, by one warp. No block has two owners.
// Float64 throughout, no atomics: the order depends on shapes alone. What is not asked for is not
// formed. Bound: memory; 8 bytes of score and the operands an element, 1/8 for rows or columns.
#pragma once

#include <cmath>

#include "core/cuda/launch.cuh"
#include "sensitivity/sums.h"

namespace pkt {

// What a kernel adds its contributions to.
struct Outputs {
  float* score;  // [rows, cols] or null
  int64_t rows, cols;
  SensitivitySums sums;
  SumSlots slots;
  bool wide;  // four columns from a multiple of four on are one 16-byte access

  // A tile that is `tile_cols` wide, a multiple of 64.
  Outputs(float* values, int64_t row_count, int64_t col_count, const SensitivitySums& wanted,
          int64_t tile_cols, void* workspace)
      : score(values),
        rows(row_count),
        cols(col_count),
        sums(wanted),
        slots(wanted, rows, cols, cuda::ceil_div(cols, tile_cols), cuda::ceil_div(rows, kSumBlock),
              cuda::ceil_div(rows, kSumBlock) * cuda::ceil_div(cols, kSumBlock), workspace),
        wide(cols % 4 == 0 && reinterpret_cast<uintptr_t>(values) % 16 == 0) {}
};

// Adds the slots to the caller's sums, in ascending order; after the kernel, on its stream.
void add_slots_cuda(const Outputs& out, void* stream);

// An operand of the score's shape, read four columns at a time.
struct Matrix {
  const void* data;
  DType dtype;
  int64_t row_stride, col_stride;
  bool wide;

  PKT_HOST_DEVICE Matrix(const void* values, DType type, int64_t rows_apart, int64_t cols_apart)
      : data(values), dtype(type), row_stride(rows_apart), col_stride(cols_apart) {
    const int64_t bytes = dtype == DType::f32 ? 4 : 2;
    wide = cols_apart == 1 && rows_apart % 4 == 0 &&
           reinterpret_cast<uintptr_t>(values) % (4 * bytes) == 0;
  }
};

template <typename T>
struct __align__(4 * sizeof(T)) Four {
  T values[4];
};

// values[n] = matrix[row + n * kApart, col .. col + 3] for n < kSteps. Ragged: any strides, and
// nothing is read at or past `rows` and `cols`.
template <typename T, int kApart, bool kRagged, int kSteps>
__device__ __forceinline__ void load_steps(float (&values)[kSteps][4], const Matrix& matrix,
                                           int64_t row, int64_t col, int64_t rows, int64_t cols) {
  const T* from = static_cast<const T*>(matrix.data) + row * matrix.row_stride;
  const int64_t apart = kApart * matrix.row_stride;
#pragma unroll
  for (int n = 0; n < kSteps; ++n) {
    if (kRagged) {
      for (int k = 0; k < 4; ++k) {
        const bool inside = row + n * kApart < rows && col + k < cols;
        values[n][k] = inside ? to_float(from[n * apart + (col + k) * matrix.col_stride]) : 0.0f;
      }
    } else {
      const auto four = *reinterpret_cast<const Four<T>*>(from + n * apart + col);
      for (int k = 0; k < 4; ++k) values[n][k] = to_float(four.values[k]);
    }
  }
}

__device__ __forceinline__ bool is_special(float value) {
  return (float_to_bits(value) & 0x7f800000u) == 0x7f800000u;
}

// Adds tiles' contributions, `kChunk` rows at a time, by `kThreads` threads.
template <int kTileCols, int kThreadCount, int kChunkRows>
struct TileSums {
  static constexpr int kCols = kTileCols, kThreads = kThreadCount, kChunk = kChunkRows;
  static constexpr int kLanes = kSumBlock / 4;       // threads along a strip
  static constexpr int kGroups = kThreads / kLanes;  // rows at once
  static constexpr int kSteps = kChunk / kGroups;    // rows of a thread, all loaded at once
  static constexpr int kWarps = kThreads / 32;
  static constexpr size_t kShared = kWarps * kCols * sizeof(double);
  static_assert(kCols % kSumBlock == 0 && kChunk % kGroups == 0 && kSumBlock % kChunk == 0, "");
  static_assert(kCols / 2 <= kThreads, "a thread owns two columns' sums");

  const Outputs& out;
  double* const partial;  // kShared bytes: [kWarps][kCols]
  const int thread;
  double columns[2] = {};  // thread's columns of the block of 64 rows: see `own_column`
  bool special = false;

  // A warp owns the columns of one strip.
  __device__ __forceinline__ int own_column(int i) const {
    return thread / 32 * kSumBlock + i * 32 + thread % 32;
  }

  // Rows from `top`, columns from `left`, slot `tile_col` of the rows. load(ragged, c, row, col)
  // sets c[n] to the contributions of row + n * kGroups, col .. col + 3; outside they do not count.
  template <typename Load, typename Sync>
  __device__ __forceinline__ void add(int64_t top, int64_t left, int64_t tile_col, const Load& load,
                                      const Sync& sync) {
    const int64_t row = top + thread / kLanes;
    const bool down = out.sums.cols || out.sums.blocks || out.sums.total;
    double row_sums[kSteps] = {};
#pragma unroll 1
    for (int strip = 0; strip < kCols; strip += kSumBlock) {
      const int64_t col = left + strip + thread % kLanes * 4;
      double sums[4] = {};
      const bool whole = top + kChunk <= out.rows && left + strip + kSumBlock <= out.cols;
      if (whole && out.wide && load.wide()) {
        add_steps<false>(row, col, load, row_sums, sums);
      } else {
#pragma unroll 1  // a step at a time: the edges are few, and would otherwise set the registers
        for (int n = 0; n < kSteps; ++n) {
          double row_sum[1] = {};
          add_steps<true>(row + n * kGroups, col, load, row_sum, sums);
#pragma unroll
          for (int m = 0; m < kSteps; ++m) row_sums[m] += m == n ? row_sum[0] : 0.0;
        }
      }
      if (!down) continue;
      for (int k = 0; k < 4; ++k) {
        sums[k] += __shfl_xor_sync(0xffffffffu, sums[k], kLanes);
        if (thread % 32 < kLanes) {
          partial[thread / 32 * kCols + strip + thread % kLanes * 4 + k] = sums[k];
        }
      }
    }
    if (out.sums.rows) write_rows(row, tile_col, row_sums);
    if (!down) return;
    sync();
    for (int i = 0; i < 2; ++i) {
      if (own_column(i) >= kCols) continue;
      for (int warp = 0; warp < kWarps; ++warp) columns[i] += partial[warp * kCols + own_column(i)];
    }
    if ((top + kChunk) % kSumBlock == 0) write_columns(top / kSumBlock, left);
  }

  template <bool kRagged, typename Load, int kCount>
  __device__ __forceinline__ void add_steps(int64_t row, int64_t col, const Load& load,
                                            double (&row_sums)[kCount], double (&sums)[4]) {
    const Matrix score(out.score, DType::f32, out.cols, 1);
    float c[kCount][4], s[kCount][4] = {};
    if (out.score) {
      load_steps<float, kGroups, kRagged>(s, score, row, col, out.rows, out.cols);
    }
    load.template contributions<kRagged>(c, row, col);
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const int64_t at = row + n * kGroups;
      for (int k = 0; k < 4; ++k) {
        if (kRagged && (at >= out.rows || col + k >= out.cols)) c[n][k] = 0.0f;
        s[n][k] += c[n][k];
        special |= is_special(s[n][k]);
      }
      if (out.score && kRagged) {
        for (int k = 0; k < 4; ++k) {
          if (at < out.rows && col + k < out.cols) out.score[at * out.cols + col + k] = s[n][k];
        }
      } else if (out.score) {
        Four<float> four;
        for (int k = 0; k < 4; ++k) four.values[k] = s[n][k];
        *reinterpret_cast<Four<float>*>(out.score + at * out.cols + col) = four;
      }
    }
    if (!out.sums.any_sum()) return;
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const double d[4] = {c[n][0], c[n][1], c[n][2], c[n][3]};
      for (int k = 0; k < 4; ++k) sums[k] += d[k];
      if (out.sums.rows) row_sums[n] += (d[0] + d[1]) + (d[2] + d[3]);
    }
  }

  __device__ __forceinline__ void write_rows(int64_t row, int64_t tile_col,
                                             double (&row_sums)[kSteps]) {
#pragma unroll
    for (int n = 0; n < kSteps; ++n) {
      for (int apart = kLanes / 2; apart > 0; apart /= 2) {
        row_sums[n] += __shfl_xor_sync(0xffffffffu, row_sums[n], apart);
      }
      const int64_t at = row + n * kGroups;
      if (thread % kLanes == 0 && at < out.rows) {
        out.slots.rows[tile_col * out.rows + at] = row_sums[n];
      }
    }
  }

  // The columns of 64 rows are complete; starts the next ones.
  __device__ __forceinline__ void write_columns(int64_t block_row, int64_t left) {
    const int64_t across = cuda::ceil_div(out.cols, kSumBlock);
    const int64_t block_col = (left + own_column(0)) / kSumBlock;
    if (block_col < across && own_column(0) < kCols) {
      double block = columns[0] + columns[1];
      for (int apart = 16; apart > 0; apart /= 2) {
        block += __shfl_xor_sync(0xffffffffu, block, apart);
      }
      if (thread % 32 == 0 && out.sums.blocks)
        out.sums.blocks[block_row * across + block_col] += block;
      if (thread % 32 == 0 && out.sums.total)
        out.slots.totals[block_row * across + block_col] = block;
    }
    for (int i = 0; i < 2; ++i) {
      const int64_t col = left + own_column(i);
      if (out.sums.cols && own_column(i) < kCols && col < out.cols) {
        out.slots.cols[block_row * out.cols + col] = columns[i];
      }
      columns[i] = 0.0;
    }
  }

  // After the last chunk.
  __device__ __forceinline__ void finish() const {
    if (special && out.sums.nonfinite) *out.sums.nonfinite = 1;
  }
};

// Ends a tile of a matrix product: contributions |weight| * sum, the sums in the threads'
// registers.
//
// They pass through shared memory by `kChunk` rows: visit(put) calls put(row, col, value) for each
// of a thread's sums, places counted in the tile, whatever its layout of them is.
template <int kRows, int kCols, int kThreads, int kChunk>
struct TileEnd {
  using Sums = TileSums<kCols, kThreads, kChunk>;
  static constexpr int kStride = kCols + 4;  // 16-byte aligned rows
  static constexpr size_t kStage = kChunk * kStride * sizeof(float);
  static constexpr size_t kShared = kStage + Sums::kShared;
  static_assert(kRows % kSumBlock == 0 && kStage % 16 == 0, "blocks of 64 x 64 have one owner");

  struct Weighted {
    const Outputs& out;
    const Matrix& weight;
    const float* stage;
    int64_t top, left;

    __device__ __forceinline__ bool wide() const { return weight.wide; }

    template <bool kRagged, int kCount>
    __device__ __forceinline__ void contributions(float (&c)[kCount][4], int64_t row,
                                                  int64_t col) const {
      constexpr int kApart = Sums::kGroups;
      const auto load = [&](auto type) {
        load_steps<decltype(type), kApart, kRagged>(c, weight, row, col, out.rows, out.cols);
      };
      if (weight.dtype == DType::f32) {
        load(float{});
      } else if (weight.dtype == DType::f16) {
        load(half{});
      } else {
        load(bfloat16{});
      }
#pragma unroll
      for (int n = 0; n < kCount; ++n) {
        const auto four = *reinterpret_cast<const float4*>(
            stage + (row - top + n * kApart) * kStride + (col - left));
        c[n][0] = fabsf(c[n][0]) * four.x;
        c[n][1] = fabsf(c[n][1]) * four.y;
        c[n][2] = fabsf(c[n][2]) * four.z;
        c[n][3] = fabsf(c[n][3]) * four.w;
      }
    }
  };

  // By kThreads threads, numbered `thread`, that meet in sync(); `shared` is 16-byte aligned.
  template <typename Visit, typename Sync>
  static __device__ __forceinline__ void run(const Outputs& out, const Matrix& weight,
                                             int64_t tile_row, int64_t tile_col, int thread,
                                             void* shared, const Visit& visit, const Sync& sync) {
    float* stage = static_cast<float*>(shared);
    Sums sums{out, reinterpret_cast<double*>(stage + kChunk * kStride), thread};
    const int64_t left = tile_col * kCols;
#pragma unroll 1
    for (int first = 0; first < kRows; first += kChunk) {
      const int64_t top = tile_row * kRows + first;
      if (top / kSumBlock * kSumBlock >= out.rows) break;
      sync();  // the last chunk, or before the first the tile's operands, are read
      visit([&](int row, int col, float value) {
        if (row >= first && row < first + kChunk) stage[(row - first) * kStride + col] = value;
      });
      sync();
      sums.add(top, left, tile_col, Weighted{out, weight, stage, top, left}, sync);
    }
    sums.finish();
  }
};

}  // namespace pkt
