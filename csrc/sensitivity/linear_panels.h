// SPDX-License-Identifier: Apache-2.0
// The operands of linear_sensitivity on the CPU, chunk by chunk, as its register tiles read them.
// A word of a panel is a float or the pair of bfloat16 that two rows of a segment have in a column.
#pragma once

#include <algorithm>
#include <type_traits>

#include "core/parallel.h"
#include "sensitivity/sensitivity.h"

namespace pkt {
namespace {

constexpr int64_t kSteps = 256;  // of a chunk; a step is a row or a pair of rows

// A chunk's steps, cut into pieces of one segment each.
struct Pieces {
  int64_t count;
  int64_t ends[kSteps];      // in steps of the chunk
  int64_t row_ends[kSteps];  // in rows of the operands
  bool carried, open;        // the first piece continues a segment, the last is to be continued
};

// Walks the rows of all segments, a chunk at a time.
class Chunk {
 public:
  Chunk(const LinearSensitivityParams& p, int64_t rows_per_step)
      : rows_per_step(rows_per_step),
        row_(p.segments[0]),
        end_(p.segments + 1),
        covered_(p.segments[p.segment_count]) {
    pieces.open = false;
  }

  const int64_t rows_per_step;
  int64_t first_row;
  Pieces pieces;

  bool is_last() const { return row_ == covered_; }

  // Ends the chunk between two segments where it is half full by then: nothing to carry.
  void advance() {
    first_row = row_;
    pieces.carried = pieces.open;
    pieces.open = false;
    pieces.count = 0;
    for (int64_t steps = 0; row_ < covered_ && !pieces.open;) {
      while (*end_ == row_) ++end_;
      const int64_t needed = ceil_div(*end_ - row_, rows_per_step), room = kSteps - steps;
      if (needed > room && steps >= kSteps / 2) break;
      pieces.open = needed > room;
      row_ = pieces.open ? row_ + room * rows_per_step : *end_;
      steps += std::min(needed, room);
      pieces.ends[pieces.count] = steps;
      pieces.row_ends[pieces.count++] = row_;
    }
  }

 private:
  int64_t row_;
  const int64_t* end_;  // of the segment that row_ belongs to, or of an earlier one
  int64_t covered_;
};

// out[j] = values[j] as a float for j < count, 0 up to `padded`.
template <typename T>
PKT_SIMD_CLONES void pack_row(uint32_t* out, const T* values, int64_t stride, int64_t count,
                              int64_t padded) {
  if (stride == 1) {
    for (int64_t j = 0; j < count; ++j) out[j] = float_to_bits(to_float(values[j]));
  } else {
    for (int64_t j = 0; j < count; ++j) out[j] = float_to_bits(to_float(values[j * stride]));
  }
  for (int64_t j = count; j < padded; ++j) out[j] = 0;
}

// out[j] = values[j] and, in its upper half, after[j] (0 without) for j < count, 0 up to `padded`.
PKT_SIMD_CLONES void pack_pair(uint32_t* out, const bfloat16* values, const bfloat16* after,
                               int64_t stride, int64_t count, int64_t padded) {
  const uint32_t upper = after ? 0xffff0000u : 0u;
  if (!after) after = values;
  if (stride == 1) {
    for (int64_t j = 0; j < count; ++j) {
      out[j] = values[j].bits | (uint32_t{after[j].bits} << 16 & upper);
    }
  } else {
    for (int64_t j = 0; j < count; ++j) {
      out[j] = values[j * stride].bits | (uint32_t{after[j * stride].bits} << 16 & upper);
    }
  }
  for (int64_t j = count; j < padded; ++j) out[j] = 0;
}

// `count` columns of a chunk's rows; a segment's odd row gets a partner of zeros.
template <typename T>
void pack(uint32_t* panel, int64_t panel_stride, const Chunk& chunk, const T* values,
          int64_t row_stride, int64_t col_stride, int64_t count, int64_t padded) {
  int64_t row = chunk.first_row;
  for (int64_t k = 0; k < chunk.pieces.count; ++k) {
    for (const int64_t end = chunk.pieces.row_ends[k]; row < end; panel += panel_stride) {
      const T* at = values + row * row_stride;
      if constexpr (std::is_same_v<T, bfloat16>) {
        if (chunk.rows_per_step == 2) {
          pack_pair(panel, at, row + 1 < end ? at + row_stride : nullptr, col_stride, count,
                    padded);
          row = std::min(row + 2, end);
          continue;
        }
      }
      pack_row(panel, at, col_stride, count, padded);
      ++row;
    }
  }
}

}  // namespace
}  // namespace pkt
