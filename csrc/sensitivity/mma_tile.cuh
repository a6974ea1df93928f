// SPDX-License-Identifier: Apache-2.0
// What the tensor-core kernels of linear_sensitivity share: the walk over the samples' rows, the
// order of the tiles, and a tile's product from panels in shared memory.
//
// A block of 8 warps owns 128 x 128 scores, a warp 64 x 32 of them: 4 x 4 products m16n8k16, so 64
// float32 a thread for the running sample and 64 for the sum. Both operands lie as they are stored,
// a row (token) after the other: a panel is 16 or 32 rows of 128 values, and ldmatrix transposes.
#pragma once

#include <cmath>

#include "core/cuda/mma.cuh"
#include "sensitivity/epilogue.cuh"
#include "sensitivity/linear_cuda.h"

namespace pkt {

namespace mma_tile {

constexpr int kTile = 128;     // scores per side
constexpr int kThreads = 256;  // 2 x 4 warps
constexpr int kRowBytes = kTile * 2;

using End = TileEnd<kTile, kTile, kThreads, 32>;

// Walks the rows of all segments in steps of kDepth or, at a segment's end, fewer. Operands have
// fewer than 2^31 rows.
template <int kDepth>
struct Steps {
  const int64_t *next, *stop;  // offsets not yet read
  int64_t ahead;               // the next segment's end, read early
  int limit;                   // rows of the operands
  int row = 0;                 // the present step's first
  int left = 0;                // rows from there to the segment's end; none: the walk is over

  explicit __device__ __forceinline__ Steps(const LinearSensitivityParams& p)
      : next(p.segments),
        stop(p.segments + p.segment_count + 1),
        ahead(*next),
        limit(static_cast<int>(p.rows)) {
    row = read();
    enter();
  }

  __device__ __forceinline__ bool last_of_segment() const { return left <= kDepth; }

  // To the next step; true where it is not the kDepth rows that follow.
  __device__ __forceinline__ bool advance() {
    row += kDepth;
    left -= kDepth;
    if (left > 0) return false;
    row += left;
    enter();
    return true;
  }

 private:
  __device__ __forceinline__ void enter() {
    for (left = 0; left <= 0 && next != stop;) {
      const int end = read();
      left = end - row;
      if (left <= 0) row = end;
    }
  }
  __device__ __forceinline__ int read() {
    const int64_t offset = ahead < 0 ? 0 : ahead < limit ? ahead : limit;
    if (++next != stop) ahead = *next;
    return static_cast<int>(offset);
  }
};

// Neighbouring blocks share panels: 12 rows of tiles are crossed column by column, so that the
// blocks that run at once form about a square and the panels they read stay in the L2 cache.
struct TilePlace {
  int64_t row, col;  // in tiles

  __device__ __forceinline__ TilePlace(int64_t index, int64_t down, int64_t across) {
    constexpr int64_t kBand = 12;
    const int64_t top = index / (kBand * across) * kBand;
    const int64_t height = down - top < kBand ? down - top : kBand;
    const int64_t within = index - top * across;
    row = top + within % height;
    col = within / height;
  }
};

// Byte offset of a row's 16-byte chunk in a panel. Chunks change places within a row, so that the
// eight rows of a matrix that ldmatrix reads, and those a quarter warp writes, meet no bank twice.
__device__ __forceinline__ int panel_offset(int row, int chunk) {
  return row * kRowBytes + ((chunk ^ row % 8) << 4);
}

// A warp's operands of 16 rows of panels.
struct Fragments {
  uint32_t grads[4][4];   // 16 rows of the tile each
  uint32_t inputs[2][4];  // 16 columns each: two operands B
};

struct Warp {
  int lane, top, left;  // of 64 x 32 scores in the tile

  explicit __device__ __forceinline__ Warp(int thread)
      : lane(thread % 32), top(thread / 128 * 64), left(thread / 32 % 4 * 32) {}

  // From the panel's row `first` on. Lane 8 j + r names row r of ldmatrix's matrix j.
  __device__ __forceinline__ void load_grads(uint32_t (&out)[4][4], const char* panel,
                                             int first) const {
    const int row = first + lane / 16 * 8 + lane % 8;
    const int chunk = top / 8 + lane / 8 % 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      cuda::ldmatrix_x4<true>(out[i], panel + panel_offset(row, chunk + 2 * i));
    }
  }
  __device__ __forceinline__ void load_inputs(uint32_t (&out)[2][4], const char* panel,
                                              int first) const {
    const int row = first + lane / 8 % 2 * 8 + lane % 8;
    const int chunk = left / 8 + lane / 16;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      cuda::ldmatrix_x4<true>(out[j], panel + panel_offset(row, chunk + 2 * j));
    }
  }
};

// A thread's share of a tile: [16 rows each][8 columns each][fragment C].
struct Sums {
  float values[4][4][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 64; ++i) values[i / 16][i / 4 % 4][i % 4] = 0.0f;
  }

  template <typename T>
  __device__ __forceinline__ void multiply_add(const uint32_t (&grads)[4][4],
                                               const uint32_t (&inputs)[2][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t b[2] = {inputs[j / 2][j % 2 * 2], inputs[j / 2][j % 2 * 2 + 1]};
        cuda::mma_m16n8k16<T>(values[i][j], grads[i], b);
      }
    }
  }

  // A sample ends: adds the magnitudes of `acc`, which starts again at zero.
  __device__ __forceinline__ void flush(Sums& acc) {
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      values[i / 16][i / 4 % 4][i % 4] += fabsf(acc.values[i / 16][i / 4 % 4][i % 4]);
    }
    acc.clear();
  }

  // put(row, column in the tile, value)
  template <typename Put>
  __device__ __forceinline__ void visit(const Warp& warp, const Put& put) const {
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      put(warp.top + i / 16 * 16 + warp.lane / 4 + i / 2 % 2 * 8,
          warp.left + i / 4 % 4 * 8 + warp.lane % 4 * 2 + i % 2, values[i / 16][i / 4 % 4][i % 4]);
    }
  }
};

}  // namespace mma_tile

}  // namespace pkt
