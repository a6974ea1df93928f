// SPDX-License-Identifier: Apache-2.0
// A thin, or A^T thin, for a large A as stored and a float32 factor of 8, 16, ... rows.
//
// BLAS packs the large matrix first, which costs more than so thin a product itself. Here A is read
// where it lies, at any alignment, and widened in registers. The factor and the result are rows
// [columns, length], so both products work on contiguous vectors and nothing is ever transposed:
//   A thin     kRows rows of A by kColumns of the factor, dot products kept as vectors; a task's
//              lanes are added up once, at its end;
//   A^T thin   kVectors vectors of a row of A by kColumns broadcasts of the factor.
// Both hold 16 or 24 accumulators (8 or 12 below AVX-512) and have one load of A or of the factor
// to two multiplications or more. A is cut so that the factor's piece stays in L1 and A's comes
// through L2, where it is asked for one piece ahead: rows are too short for the hardware to see it.
//
// Bound: float32 FMA, or reading A once. Numerics: float32 sums of kTaskDepth / kLanes terms a
// lane, or of kBlockRows terms, are added up in float32. Tasks own parts of the result and their
// number comes from the shape: equal bits on any thread count; instruction sets differ by rounding.
//
// Dropped: widening six rows into L1 first, with factor and result as [length, columns] (half to
// two thirds of this speed at 16 columns); strips of 48 columns of A (no better, and fewer widths
// divide by them); narrower tasks of A^T thin (a third slower: every row is another page). Not
// tried: bf16 dot products, of which a factor exact to float32 takes three.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "core/parallel.h"
#include "low_rank/low_rank.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PKT_X86_TILES
#include <immintrin.h>
#endif

namespace pkt {
namespace {

constexpr int64_t kTaskRows = 24;    // of A, in a task of A thin: their sums stay in L1
constexpr int64_t kTaskDepth = 512;  // columns of A at a time there: 8 of the factor fill half L1
constexpr int64_t kTaskCols = 512;   // of A, in a task of A^T thin: fewer, and pages outweigh work
constexpr int64_t kBlockRows = 128;  // rows of A at a time there
constexpr int64_t kChunk = 32;       // columns of the factor at a time
constexpr int kIntoL2 = 2;           // __builtin_prefetch's locality

namespace baseline {
#define PKT_TILE_TARGET
#define PKT_TILE_LANES 4
#define PKT_TILE_ROWS 2
#define PKT_TILE_VECTORS 2
#define PKT_TILE_COLUMNS 4
#define PKT_TILE_FMA(a, b, c) ((a) * (b) + (c))
#define PKT_TILE_KEEP(z)
#include "low_rank/thin_tile.h"
}  // namespace baseline

#if defined(PKT_X86_TILES)
namespace avx2 {
#define PKT_TILE_TARGET __attribute__((target("avx2,fma,f16c")))
#define PKT_TILE_LANES 8
#define PKT_TILE_ROWS 3
#define PKT_TILE_VECTORS 3
#define PKT_TILE_COLUMNS 4
#define PKT_TILE_FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define PKT_TILE_KEEP(z) asm("" : "+x"(z))
#define PKT_TILE_WIDEN_HALF(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p)))
#include "low_rank/thin_tile.h"
}  // namespace avx2

namespace avx512 {
#define PKT_TILE_TARGET __attribute__((target("avx512f")))
#define PKT_TILE_LANES 16
#define PKT_TILE_ROWS 3
#define PKT_TILE_VECTORS 2
#define PKT_TILE_COLUMNS 8
#define PKT_TILE_FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define PKT_TILE_KEEP(z) asm("" : "+v"(z))
#define PKT_TILE_PACKED(p) _mm256_loadu_si256((const __m256i*)(p))
#define PKT_TILE_WIDEN_BF16(p) \
  ((__v16su)_mm512_maskz_cvtepu16_epi32(0xffff, PKT_TILE_PACKED(p)) << 16)
#define PKT_TILE_WIDEN_HALF(p) _mm512_maskz_cvtph_ps(0xffff, PKT_TILE_PACKED(p))
#include "low_rank/thin_tile.h"
#undef PKT_TILE_PACKED
}  // namespace avx512
#endif

// A tile for elements T: what the drivers below need to know of an instruction set.
template <typename T>
struct Tile {
  int64_t lanes, rows, strip, columns;  // strip: columns of A in transposed_tile
  void (*multiply)(const T*, int64_t, const float*, int64_t, int64_t, int64_t, float*);
  void (*sum_lanes)(float*, int64_t);
  void (*transposed)(const T*, int64_t, const float*, int64_t, int64_t, int64_t, float*, int64_t);
};

// clang-format off
#define PKT_TILE_OF(isa)                                                         \
  Tile<T> {                                                                      \
    isa::kLanes, isa::kRows, isa::kLanes * isa::kVectors, isa::kColumns,         \
        isa::multiply_tile<T>, isa::sum_lanes, isa::transposed_tile<T>           \
  }
// clang-format on

template <typename T>
Tile<T> choose_tile(int variant) {
#if defined(PKT_X86_TILES)
  __builtin_cpu_init();
  const int level = variant < 0 ? 2 : variant;
  if (level >= 2 && __builtin_cpu_supports("avx512f")) return PKT_TILE_OF(avx512);
  if (level >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return PKT_TILE_OF(avx2);
  }
#endif
  return PKT_TILE_OF(baseline);
}

constexpr int64_t kMostLanes = 16, kMostRows = 3, kMostStrip = 32, kMostColumns = 8;

// Copies a block of rows, zeros behind each.
template <typename T>
void copy_padded(T* out, int64_t width, const T* rows, int64_t stride, int64_t count,
                 int64_t present) {
  for (int64_t r = 0; r < count; ++r) {
    std::copy(rows + r * stride, rows + r * stride + present, out + r * width);
    std::fill(out + r * width + present, out + (r + 1) * width, T{});
  }
}

// Elements [first, last) of each row of A thin, columns [0, columns) of the factor; `next` is how
// far on this thread's next rows begin, as a guess.
template <typename T>
void multiply(const Tile<T>& tile, const ThinProductParams& p, const float* thin, float* out,
              int64_t columns, int64_t first, int64_t last, int64_t next) {
  const T* matrix = static_cast<const T*>(p.matrix);
  const int64_t tile_sums = tile.columns * tile.lanes;
  alignas(64) float sums[kTaskRows * kChunk * kMostLanes];  // [tile, rows, tile columns, lanes]
  std::fill(sums, sums + kTaskRows * columns * tile.lanes, 0.0f);

  const auto add_band = [&](const T* a, int64_t stride, const float* z, int64_t z_stride, int64_t i,
                            int64_t count, int64_t ahead) {
    // Rows too few for a tile go alone, as a tile that has them several times.
    const bool whole = i + tile.rows <= last;
    for (int64_t c = 0; c < columns; c += tile.columns) {
      float* found = sums + ((i - first) * columns + c * tile.rows) * tile.lanes;
      if (whole) {
        tile.multiply(a, stride, z + c * z_stride, z_stride, count, ahead, found);
        continue;
      }
      for (int64_t r = 0; r < last - i; ++r) {
        alignas(64) float repeated[kMostRows * kMostColumns * kMostLanes] = {};
        tile.multiply(a + r * stride, 0, z + c * z_stride, z_stride, count, ahead, repeated);
        for (int64_t k = 0; k < tile_sums; ++k) found[r * tile_sums + k] += repeated[k];
      }
    }
  };

  const int64_t whole = p.cols / tile.lanes * tile.lanes;
  for (int64_t k = 0; k < whole; k += kTaskDepth) {
    const int64_t count = std::min(kTaskDepth, whole - k);
    const int64_t ahead = k + kTaskDepth < whole ? kTaskDepth : next - k;
    for (int64_t i = first; i < last; i += tile.rows) {
      add_band(matrix + i * p.row_stride + k, p.row_stride, thin + k, p.cols, i, count, ahead);
    }
  }
  if (whole < p.cols) {
    T a[kMostRows * kMostLanes];
    float z[kChunk * kMostLanes];
    copy_padded(z, tile.lanes, thin + whole, p.cols, columns, p.cols - whole);
    for (int64_t i = first; i < last; i += tile.rows) {
      copy_padded(a, tile.lanes, matrix + i * p.row_stride + whole, p.row_stride,
                  std::min(tile.rows, last - i), p.cols - whole);
      add_band(a, tile.lanes, z, tile.lanes, i, tile.lanes, 0);
    }
  }
  tile.sum_lanes(sums, ceil_div(last - first, tile.rows) * tile.rows * columns * tile.lanes);
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t in_tile = (i - first) % tile.rows, corner = i - first - in_tile;
      const int64_t place = corner * columns + c / tile.columns * tile.columns * tile.rows +
                            in_tile * tile.columns + c % tile.columns;
      const float sum = sums[place * tile.lanes];
      out[c * p.rows + i] = p.accumulate ? out[c * p.rows + i] + sum : sum;
    }
  }
}

// Elements [first, last) of each row of A^T thin.
template <typename T>
void multiply_transposed(const Tile<T>& tile, const ThinProductParams& p, int64_t first,
                         int64_t last) {
  const T* matrix = static_cast<const T*>(p.matrix);
  const int64_t whole = last - (last - first) % tile.strip, rest = last - whole;
  if (!p.accumulate) {
    for (int64_t c = 0; c < p.columns; ++c) {
      std::fill(p.out + c * p.cols + first, p.out + c * p.cols + last, 0.0f);
    }
  }
  for (int64_t i = 0; i < p.rows; i += kBlockRows) {
    const int64_t count = std::min(kBlockRows, p.rows - i);
    const int64_t ahead = i + kBlockRows < p.rows ? kBlockRows * p.row_stride : 0;
    const T* a = matrix + i * p.row_stride;
    for (int64_t c = 0; c < p.columns; c += tile.columns) {
      for (int64_t j = first; j < whole; j += tile.strip) {
        tile.transposed(a + j, p.row_stride, p.thin + c * p.rows + i, p.rows, count, ahead,
                        p.out + c * p.cols + j, p.cols);
      }
    }
    if (rest == 0) continue;
    T padded[kBlockRows * kMostStrip];
    copy_padded(padded, tile.strip, a + whole, p.row_stride, count, rest);
    for (int64_t c = 0; c < p.columns; c += tile.columns) {
      float found[kMostColumns * kMostStrip] = {};
      tile.transposed(padded, tile.strip, p.thin + c * p.rows + i, p.rows, count, 0, found,
                      tile.strip);
      for (int64_t k = 0; k < tile.columns * rest; ++k) {
        p.out[(c + k / rest) * p.cols + whole + k % rest] +=
            found[k / rest * tile.strip + k % rest];
      }
    }
  }
}

template <typename T>
void multiply_all(const ThinProductParams& p, int threads) {
  const Tile<T> tile = choose_tile<T>(p.variant);
  if (p.transposed) {
    const int64_t step = kTaskCols / tile.strip * tile.strip;
    parallel_for(threads, ceil_div(p.cols, step), [&](int64_t task) {
      multiply_transposed(tile, p, task * step, std::min(p.cols, (task + 1) * step));
    });
    return;
  }
  const int64_t next = threads * kTaskRows * p.row_stride;
  parallel_for(threads, ceil_div(p.rows, kTaskRows), [&](int64_t task) {
    const int64_t last = std::min(p.rows, (task + 1) * kTaskRows);
    for (int64_t c = 0; c < p.columns; c += kChunk) {
      multiply(tile, p, p.thin + c * p.cols, p.out + c * p.rows, std::min(kChunk, p.columns - c),
               task * kTaskRows, last, c + kChunk < p.columns ? 0 : next);
    }
  });
}

}  // namespace

void thin_product_cpu(const ThinProductParams& p, int threads) {
  if (p.dtype == DType::f32) return multiply_all<float>(p, threads);
  if (p.dtype == DType::f16) return multiply_all<half>(p, threads);
  if (p.dtype == DType::bf16) return multiply_all<bfloat16>(p, threads);
  throw std::logic_error("thin_product: dtype the binding does not admit");
}

}  // namespace pkt
