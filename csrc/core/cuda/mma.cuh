// SPDX-License-Identifier: Apache-2.0
// Products on the tensor cores, m16n8k16 with float32 accumulation, and the loads that bring their
// fragments from shared memory. A warp works as one; all 32 lanes must take part. Fragment layouts
// are those of the PTX ISA, "mma.m16n8k16" and "ldmatrix"; with g = lane / 4 and t = lane % 4:
//   a[i] holds A[g + 8 (i % 2)][2t + 8 (i / 2) and the next], A being 16 x 16,
//   b[i] holds B[2t + 8 i and the next][g], B being 16 x 8,
//   c[i] holds C[g + 8 (i / 2)][2t + i % 2], C being 16 x 8.
// Under the host emulation each has a twin that works from these layouts. Needs sm_80; before that
// they trap, and the host must not choose them.
#pragma once

#include <type_traits>

#include "core/cuda/launch.cuh"
#include "core/dtype.h"

namespace pkt::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define PKT_TENSOR_CORES 1
#endif

#if defined(PKT_EXT_EMULATED)
namespace twin {

template <typename T>
float low_or_high(uint32_t pair, int high) {
  return to_float(T{static_cast<uint16_t>(pair >> 16 * high)});
}

struct MmaLane {
  float* c;
  const uint32_t *a, *b;
};

// Products are exact in float32 and added to c in ascending k, one rounding each. The hardware's
// order and rounding within one such product are its own.
template <typename T>
void mma(void* const* lanes) {
  float a[16][16], b[16][8];
  const auto lane_of = [lanes](int lane) { return *static_cast<const MmaLane*>(lanes[lane]); };
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      for (int high = 0; high < 2; ++high) {
        a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + high] = low_or_high<T>(lane_of(lane).a[i], high);
        if (i < 2) b[2 * t + 8 * i + high][g] = low_or_high<T>(lane_of(lane).b[i], high);
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      float& c = lane_of(lane).c[i];
      for (int k = 0; k < 16; ++k) c += a[lane / 4 + 8 * (i / 2)][k] * b[k][lane % 4 * 2 + i % 2];
    }
  }
}

struct LdmatrixLane {
  uint32_t* out;
  const uint16_t* row;
};

// Lane 8 j + r names row r of the j-th 8 x 8 matrix.
template <bool kTransposed>
void ldmatrix(void* const* lanes) {
  const auto lane_of = [lanes](int lane) { return *static_cast<const LdmatrixLane*>(lanes[lane]); };
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int j = 0; j < 4; ++j) {
      const auto element = [&](int row, int col) {
        return uint32_t{lane_of(8 * j + row).row[col]};
      };
      lane_of(lane).out[j] = kTransposed ? element(2 * t, g) | element(2 * t + 1, g) << 16
                                         : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
    }
  }
}

}  // namespace twin
#endif

// Whether the current device can run what is below.
inline bool has_tensor_cores() {
#if defined(PKT_EXT_EMULATED)
  return true;
#else
  int device = 0, major = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "cudaDeviceGetAttribute");
  return major >= 8;
#endif
}

// c += A B. T is half or bfloat16.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
#if defined(PKT_EXT_EMULATED)
  twin::MmaLane lane{c, a, b};
  emulation::warp_collective(&lane, twin::mma<T>);
#elif defined(PKT_TENSOR_CORES)
  if constexpr (std::is_same_v<T, half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  __trap();
#endif
}

// Four 8 x 8 matrices of 16-bit values from shared memory: lane 8 j + r hands in the address of row
// r, 16 bytes and aligned so, of matrix j. out[j] gets the matrix's [g][2t and the next], or, where
// kTransposed, its [2t and the next][g].
template <bool kTransposed>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
#if defined(PKT_EXT_EMULATED)
  twin::LdmatrixLane lane{out, static_cast<const uint16_t*>(row)};
  emulation::warp_collective(&lane, twin::ldmatrix<kTransposed>);
#elif defined(PKT_TENSOR_CORES)
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  }
#else
  __trap();
#endif
}

// Two float32 values rounded to bfloat16 (to nearest, ties to even), `low` in the low half.
__device__ __forceinline__ uint32_t pack_bfloat16(float low, float high) {
#if defined(PKT_TENSOR_CORES)
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  bfloat16 halves[2];
  from_float(low, halves[0]);
  from_float(high, halves[1]);
  return uint32_t{halves[0].bits} | uint32_t{halves[1].bits} << 16;
#endif
}

}  // namespace pkt::cuda
