// SPDX-License-Identifier: Apache-2.0
// One register tile of linear_sensitivity on the CPU. linear_cpu.cpp includes this file once per
// instruction set, having defined PKT_TILE_NAME, PKT_TILE_TARGET (function attribute),
// PKT_TILE_LANES, PKT_TILE_ROWS, PKT_TILE_VECTORS and PKT_TILE_FMA(a, b, c). A template cannot do
// this: GCC splits vector types wider than the template's own target before it inlines.

// Adds to sum [ROWS, VECTORS * LANES] the magnitudes of grads^T inputs over each of the pieces. The
// first one goes on from `carry` if it is carried, the last one goes there if it stays open.
PKT_TILE_TARGET void PKT_TILE_NAME(const uint32_t* grads, const uint32_t* inputs,
                                   int64_t panel_stride, const Pieces& pieces, float* sum,
                                   float* carry, int64_t sum_stride) {
  constexpr int kLanes = PKT_TILE_LANES;
  constexpr int kRows = PKT_TILE_ROWS;
  constexpr int kVectors = PKT_TILE_VECTORS;
  typedef float Vector __attribute__((vector_size(kLanes * 4)));
  typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
  typedef float Memory __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

  int64_t step = 0;
  bool carried = pieces.carried;
  for (int64_t k = 0; k < pieces.count; ++k) {
    Vector acc[kRows][kVectors];  // unrolled throughout, so that it is registers
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        acc[r][v] =
            carried ? *reinterpret_cast<Memory*>(carry + r * sum_stride + v * kLanes) : Vector{};
      }
    }
    for (; step < pieces.ends[k]; ++step, grads += panel_stride, inputs += panel_stride) {
      Vector x[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        x[v] = *reinterpret_cast<const Memory*>(inputs + v * kLanes);
      }
      for (int r = 0; r < kRows; ++r) {
        const Vector d = (Vector)(grads[r] + Words{});  // broadcast
        for (int v = 0; v < kVectors; ++v) acc[r][v] = PKT_TILE_FMA(d, x[v], acc[r][v]);
      }
    }
    const bool closed = k + 1 < pieces.count || !pieces.open;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        const int64_t place = r * sum_stride + v * kLanes;
        if (closed) {
          const Vector magnitude = (Vector)((Words)acc[r][v] & 0x7fffffffu);
          *reinterpret_cast<Memory*>(sum + place) += magnitude;
        } else {
          *reinterpret_cast<Memory*>(carry + place) = acc[r][v];
        }
      }
    }
    carried = false;
  }
}

#undef PKT_TILE_NAME
#undef PKT_TILE_TARGET
#undef PKT_TILE_LANES
#undef PKT_TILE_ROWS
#undef PKT_TILE_VECTORS
#undef PKT_TILE_FMA
