// SPDX-License-Identifier: Apache-2.0
// The two register tiles of thin_product. thin_product_cpu.cpp includes this file once per
// instruction set, in a namespace of its own, having defined PKT_TILE_TARGET (function attribute),
// PKT_TILE_LANES, PKT_TILE_ROWS, PKT_TILE_VECTORS, PKT_TILE_COLUMNS, PKT_TILE_FMA(a, b, c),
// PKT_TILE_KEEP(vector) and, where there are better ways than the ones below,
// PKT_TILE_WIDEN_BF16(pointer) and PKT_TILE_WIDEN_HALF(pointer).

constexpr int kLanes = PKT_TILE_LANES;
constexpr int kRows = PKT_TILE_ROWS;        // of A in multiply_tile
constexpr int kVectors = PKT_TILE_VECTORS;  // of a row of A in transposed_tile
constexpr int kColumns = PKT_TILE_COLUMNS;  // of the thin factor in both

typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
typedef float Memory __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t Packed __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

// kLanes elements of A as float32.
#define PKT_TILE_INLINE static inline __attribute__((always_inline)) PKT_TILE_TARGET
PKT_TILE_INLINE Vector widen(const float* values) {
  return *reinterpret_cast<const Memory*>(values);
}
PKT_TILE_INLINE Vector widen(const bfloat16* values) {
#if defined(PKT_TILE_WIDEN_BF16)
  return (Vector)PKT_TILE_WIDEN_BF16(values);
#else
  return (Vector)(__builtin_convertvector(*reinterpret_cast<const Packed*>(values), Bits) << 16);
#endif
}
PKT_TILE_INLINE Vector widen(const half* values) {
#if defined(PKT_TILE_WIDEN_HALF)
  return (Vector)PKT_TILE_WIDEN_HALF(values);
#else  // as core/dtype.h does it
  const Bits bits = __builtin_convertvector(*reinterpret_cast<const Packed*>(values), Bits);
  const Vector scaled = (Vector)(bits << 13 & 0x0fffe000u) * 0x1p112f;
  const Bits special = (Bits)((bits & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return (Vector)((Bits)scaled | special | (bits << 16 & 0x80000000u));
#endif
}

// sums[r, c, :] += A[r, k] * thin[c, k], lane by lane over k < count, a multiple of kLanes; asks
// for the elements `ahead` of these.
template <typename T>
PKT_TILE_TARGET void multiply_tile(const T* a, int64_t stride, const float* thin,
                                   int64_t thin_stride, int64_t count, int64_t ahead, float* sums) {
  Vector acc[kRows][kColumns] = {};  // unrolled throughout, so that it is registers
  for (int64_t k = 0; k < count; k += kLanes) {
    Vector x[kRows];
    for (int r = 0; r < kRows; ++r) {
      x[r] = widen(a + r * stride + k);
      __builtin_prefetch(a + r * stride + k + ahead, 0, kIntoL2);
    }
    for (int c = 0; c < kColumns; ++c) {
      Vector z = *reinterpret_cast<const Memory*>(thin + c * thin_stride + k);
      PKT_TILE_KEEP(z);  // in a register, or each multiplication loads it again
      for (int r = 0; r < kRows; ++r) acc[r][c] = PKT_TILE_FMA(x[r], z, acc[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      *reinterpret_cast<Memory*>(sums + (r * kColumns + c) * kLanes) += acc[r][c];
    }
  }
}

// The first of every kLanes elements becomes their sum, pairwise.
PKT_TILE_TARGET void sum_lanes(float* sums, int64_t count) {
  for (int64_t at = 0; at < count; at += kLanes) {
#pragma GCC unroll 4
    for (int half_width = kLanes / 2; half_width > 0; half_width /= 2) {
#pragma GCC unroll 8
      for (int k = 0; k < half_width; ++k) sums[at + k] += sums[at + k + half_width];
    }
  }
}

// out[c, j] += A[i, j] * thin[c, i] over i < count, for the j of kVectors vectors; asks for the
// elements `ahead` of these.
template <typename T>
PKT_TILE_TARGET void transposed_tile(const T* a, int64_t stride, const float* thin,
                                     int64_t thin_stride, int64_t count, int64_t ahead, float* out,
                                     int64_t out_stride) {
  constexpr int kLine = 64 / sizeof(T);
  Vector acc[kColumns][kVectors] = {};
  for (int64_t i = 0; i < count; ++i, a += stride) {
    Vector x[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      x[v] = widen(a + v * kLanes);
      if (v * kLanes % kLine == 0) __builtin_prefetch(a + v * kLanes + ahead, 0, kIntoL2);
    }
    for (int c = 0; c < kColumns; ++c) {
      const Vector y = thin[c * thin_stride + i] - Vector{};  // broadcast
      for (int v = 0; v < kVectors; ++v) acc[c][v] = PKT_TILE_FMA(y, x[v], acc[c][v]);
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < kColumns; ++c) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      *reinterpret_cast<Memory*>(out + c * out_stride + v * kLanes) += acc[c][v];
    }
  }
}

#undef PKT_TILE_INLINE
#undef PKT_TILE_TARGET
#undef PKT_TILE_LANES
#undef PKT_TILE_ROWS
#undef PKT_TILE_VECTORS
#undef PKT_TILE_COLUMNS
#undef PKT_TILE_FMA
#undef PKT_TILE_WIDEN_BF16
#undef PKT_TILE_WIDEN_HALF
#undef PKT_TILE_KEEP
