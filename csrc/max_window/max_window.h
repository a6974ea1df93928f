// SPDX-License-Identifier: Apache-2.0
// Best contiguous window of a score matrix (Seeking, arXiv 2310.11451; METHODS equation S5).
//
// Core and fringe, the same on the CPU and the GPU. Going down by one, a window of `height` rows
// loses row k and gains row height + k, for k < steps = rows - height; the rows from `steps` to
// `height`, where there are any, lie in every window. R[r, j] being the sum of row r over columns
// j .. j + width - 1 (one sum, then differences to the right):
//   sweep    cuts the rows into chunks. A chunk of the core sums its rows' R. A chunk of the fringe
//            sums those of its leaving rows k and of the entering rows height + k, and after each
//            pair compares the difference, the way the window has gone since the chunk's start,
//            with the best so far. A few vectors a chunk come out, no row: scores are read once.
//   settle   the first window is the sum over the leaving and the core rows; the chunks' ways, in
//            order, give each chunk's start, to which its best is added; the best of all wins.
// All sums are float64. The chunks depend on the shape alone and their vectors are added in order:
// equal scores give equal bits on any number of threads or multiprocessors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "core/dtype.h"

namespace pkt {

// For each of `batch` matrices: the first position, in row-major order, whose height x width window
// has the largest float64 sum. A matrix that holds a NaN or an infinity gives (-1, -1, NaN).
struct MaxWindowParams {
  const void* score;  // [batch, rows, cols] of `dtype`
  DType dtype;
  int64_t batch, rows, cols;
  int64_t batch_stride, row_stride, col_stride;  // in elements
  int64_t height, width;                         // 1 <= height <= rows, 1 <= width <= cols
  bool transposed;    // what is called a row here is a column to the caller: row and col trade
  double* workspace;  // max_window_workspace(...) values
  int64_t* row;       // [batch]
  int64_t* col;       // [batch]
  double* total;      // [batch]

  // A place's rank in the caller's row-major order, and what that says to the caller.
  PKT_HOST_DEVICE int64_t rank(int64_t r, int64_t c) const {
    return transposed ? c * rows + r : r * cols + c;
  }
  PKT_HOST_DEVICE void report(int64_t matrix, int64_t place, double best, bool finite) const {
    const int64_t across = transposed ? rows : cols;
    row[matrix] = finite ? place / across : -1;
    col[matrix] = finite ? place % across : -1;
    total[matrix] = finite ? best : std::numeric_limits<double>::quiet_NaN();
  }
};

// How a matrix is cut. Chunk c holds the leaving rows from first(c) to first(c + 1), or rows of the
// core where it is one of the last: as many of them as a pair has.
struct MaxWindowPlan {
  int64_t steps, places;   // moves down; positions along a row
  int64_t paired, end;     // where the first window's leaving rows end; where all chunks' rows do
  int64_t size, rest;      // rows of a chunk before and from `paired` on
  int64_t before, chunks;  // chunks before `paired`; all
  int64_t starts, moves;   // the first chunks: those of the first window, those with pairs

  // About `wanted` chunks that read equally many rows.
  MaxWindowPlan(const MaxWindowParams& p, int64_t wanted)
      : steps(p.rows - p.height),
        places(p.cols - p.width + 1),
        paired(std::min(steps, p.height)),
        end(std::max(steps, p.height)) {
    const bool core = p.height >= steps;
    size = std::max<int64_t>(4, (core ? steps + p.height : 2 * steps) / (2 * wanted));
    rest = core ? 2 * size : size;
    before = (paired + size - 1) / size;
    chunks = before + (end - paired + rest - 1) / rest;
    starts = core ? chunks : before;
    moves = core ? before : chunks;
  }

  PKT_HOST_DEVICE int64_t first(int64_t chunk) const {
    if (chunk < before) return chunk * size;
    const int64_t row = paired + (chunk - before) * rest;
    return row < end ? row : end;
  }
};

// Float64 values of workspace that either entry point needs, for the whole batch.
int64_t max_window_workspace_cpu(const MaxWindowParams& params);
int64_t max_window_workspace_cuda(const MaxWindowParams& params);

void max_window_cpu(const MaxWindowParams& params, int threads);
void max_window_cuda(const MaxWindowParams& params, void* stream);

}  // namespace pkt
