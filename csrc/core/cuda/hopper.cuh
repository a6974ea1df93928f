// SPDX-License-Identifier: Apache-2.0
// What only sm_90a has: boxes copied by the tensor memory accelerator (TMA), barriers in shared
// memory that count their bytes, and products of a warpgroup (wgmma) that read both operands from
// shared memory. Layouts are those of the PTX ISA, "tensor swizzling modes" and "wgmma shared
// memory matrix layout". On other architectures they trap, and the host must not choose them; under
// the emulation each has a twin that works from these layouts.
#pragma once

#include <type_traits>

#include "core/cuda/launch.cuh"
#include "core/dtype.h"

#if !defined(PKT_EXT_EMULATED)
#include <cuda.h>
#endif

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PKT_HOPPER 1
#endif

namespace pkt::cuda {

// Whether the current device can run what is below and the build holds code for it.
inline bool is_hopper() {
#if defined(PKT_EXT_EMULATED)
  return true;
#elif !defined(PKT_EXT_HOPPER)  // CMakeLists.txt: sm_90a is among the architectures
  return false;
#else
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
        "cudaDeviceGetAttribute");
  return major == 9 && minor == 0;
#endif
}

// An address in the block's shared memory as descriptors and barriers take it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
#if defined(PKT_EXT_EMULATED)
  return static_cast<uint32_t>(static_cast<const char*>(pointer) -
                               static_cast<const char*>(emulation::shared_memory()));
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
#endif
}

// With 128-byte swizzling, bits 7 to 9 of an address in shared memory are added to bits 4 to 6: the
// eight 16-byte chunks of a 128-byte line change places by the line's number.
PKT_HOST_DEVICE uint32_t swizzled_128(uint32_t address) {
  return address ^ (address >> 7 & 7) << 4;
}

// ---- Barriers. A phase ends when `count` threads have arrived and all bytes expected have landed.

using Barrier = uint64_t;

__device__ __forceinline__ void barrier_init(Barrier* barrier, unsigned count) {
#if defined(PKT_EXT_EMULATED)
  emulation::transaction_barrier_init(barrier, count);
#elif defined(PKT_HOPPER)
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
#else
  __trap();
#endif
}

// After barrier_init, before the block's __syncthreads: the initial state is there for TMA as well.
__device__ __forceinline__ void barrier_init_done() {
#if defined(PKT_HOPPER)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
#if defined(PKT_EXT_EMULATED)
  emulation::transaction_barrier_arrive(barrier, 0);
#elif defined(PKT_HOPPER)
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
#else
  __trap();
#endif
}

// Arrives, the phase now also waiting for that many bytes.
__device__ __forceinline__ void barrier_arrive_expecting(Barrier* barrier, unsigned bytes) {
#if defined(PKT_EXT_EMULATED)
  emulation::transaction_barrier_arrive(barrier, bytes);
#elif defined(PKT_HOPPER)
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#else
  __trap();
#endif
}

// Until the phase of this parity (the first is 0) has ended; parity 1 of a new barrier has.
__device__ __forceinline__ void barrier_wait(Barrier* barrier, unsigned parity) {
#if defined(PKT_EXT_EMULATED)
  emulation::transaction_barrier_wait(barrier, parity);
#elif defined(PKT_HOPPER)
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#else
  __trap();
#endif
}

// Stages and the parity of their barriers, in turn.
template <int kCount>
struct Turn {
  int stage = 0;
  unsigned parity = 0;

  __device__ __forceinline__ void next() {
    if (++stage == kCount) stage = 0, parity ^= 1;
  }
};

// __syncthreads among `threads` (whole warps) that share `id`, 1 to 15.
__device__ __forceinline__ void named_barrier(int id, int threads) {
#if defined(PKT_EXT_EMULATED)
  emulation::named_barrier(id, threads);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// What this thread wrote to shared memory before is there for TMA and wgmma after.
__device__ __forceinline__ void fence_for_async() {
#if defined(PKT_HOPPER)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#elif !defined(PKT_EXT_EMULATED)
  __trap();
#endif
}

// ---- TMA: a box of a matrix of 16-bit values, 64 columns by `box_rows` rows, to lines of 128
// bytes with 128-byte swizzling. What lies outside the matrix is zero.

#if defined(PKT_EXT_EMULATED)
struct TensorMap {
  const char* data;
  int64_t rows, cols, row_bytes;
  int box_rows;
};
#else
using TensorMap = CUtensorMap;
#endif

constexpr int kBoxCols = 64;

// Rows are contiguous, start at multiples of 16 bytes and are fewer than 2^31.
inline TensorMap tensor_map(const void* data, int64_t rows, int64_t cols, int64_t row_bytes,
                            int box_rows) {
#if defined(PKT_EXT_EMULATED)
  return {static_cast<const char*>(data), rows, cols, row_bytes, box_rows};
#else
  // found at run time, so that nothing here links to the driver's library
  void* symbol = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000,
                                         cudaEnableDefault, &found),
        "cudaGetDriverEntryPointByVersion");
#else
  check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &symbol, cudaEnableDefault, &found),
        "cudaGetDriverEntryPoint");
#endif
  if (found != cudaDriverEntryPointSuccess) {
    throw std::runtime_error("this driver has no cuTensorMapEncodeTiled");
  }
  TensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(row_bytes)};
  const cuuint32_t box[] = {kBoxCols, static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  const CUresult status = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(symbol)(
      &map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<void*>(data), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(status));
  }
  return map;
#endif
}

#if defined(PKT_EXT_EMULATED)
namespace twin {
// Line by line, chunk by chunk, to where the swizzle puts it.
inline void land_box(const TensorMap& map, uint32_t to, int col, int row, bool poison) {
  char* const shared = static_cast<char*>(emulation::shared_memory());
  for (int r = 0; r < map.box_rows; ++r) {
    for (int c = 0; c < kBoxCols; ++c) {
      const bool inside = row + r >= 0 && row + r < map.rows && col + c >= 0 && col + c < map.cols;
      uint16_t value = poison ? 0xffff : 0;
      if (inside && !poison) {
        std::memcpy(&value, map.data + (row + r) * map.row_bytes + (col + c) * 2, 2);
      }
      std::memcpy(shared + swizzled_128(to + r * 128 + c * 2), &value, 2);
    }
  }
}
}  // namespace twin
#endif

// Lands at any time, and counts on `barrier`. `to_shared` is a multiple of 1024.
__device__ __forceinline__ void copy_box(void* to_shared, const TensorMap& map, int col, int row,
                                         Barrier* barrier) {
#if defined(PKT_EXT_EMULATED)
  const uint32_t to = shared_address(to_shared);
  if (to % 1024 != 0) throw std::runtime_error("copy_box: not at a multiple of 1024");
  twin::land_box(map, to, col, row, true);
  emulation::transaction_later(barrier, static_cast<unsigned>(map.box_rows) * 128,
                               [map, to, col, row] { twin::land_box(map, to, col, row, false); });
#elif defined(PKT_HOPPER)
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(to_shared)),
      "l"(&map), "r"(col), "r"(row), "r"(shared_address(barrier))
      : "memory");
#else
  __trap();
#endif
}

// ---- wgmma, both operands k rows by 64 or 192 columns of 16-bit values as copy_box leaves them.
// With the columns contiguous, a line of 128 bytes holds 64 columns of one row, and boxes of 64
// columns follow `box_bytes` apart; with the depth contiguous, a line holds 64 rows of one column.

// Of 16 rows that start at `rows_at`, a multiple of 1024: eight lines are 1024 bytes apart from the
// next eight (stride), 64 columns `box_bytes` from the next 64 (leading dimension).
__device__ __forceinline__ uint64_t columns_descriptor(const void* rows_at, int box_bytes) {
  constexpr uint64_t kSwizzle128 = 1, kEightLines = 1024;
  return uint64_t{(shared_address(rows_at) & 0x3ffff) >> 4} |
         static_cast<uint64_t>(box_bytes >> 4) << 16 | (kEightLines >> 4) << 32 | kSwizzle128 << 62;
}

// Of 16 rows from `first` on, a multiple of 16, of lines that start at a multiple of 1024 and hold
// the rows' 64: eight lines (columns) are 1024 bytes apart from the next eight (stride).
__device__ __forceinline__ uint64_t depth_descriptor(const void* lines_at, int first) {
  constexpr uint64_t kSwizzle128 = 1, kEightLines = 1024, kUnused = 1;
  return uint64_t{((shared_address(lines_at) + static_cast<uint32_t>(first) * 2) & 0x3ffff) >> 4} |
         kUnused << 16 | (kEightLines >> 4) << 32 | kSwizzle128 << 62;
}

__device__ __forceinline__ void wgmma_fence() {
#if defined(PKT_HOPPER)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#elif !defined(PKT_EXT_EMULATED)
  __trap();
#endif
}

__device__ __forceinline__ void wgmma_commit() {
#if defined(PKT_HOPPER)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#elif !defined(PKT_EXT_EMULATED)
  __trap();
#endif
}

// Until all this thread's products are done: its sums may be read, the operands overwritten.
__device__ __forceinline__ void wgmma_wait_all() {
#if defined(PKT_EXT_EMULATED)
  emulation::run_deferred();
#elif defined(PKT_HOPPER)
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#else
  __trap();
#endif
}

// Sums that wgmma adds to behind the compiler's back: it moves no use of them across this. Before
// wgmma_fence, and between wgmma_wait_all and the first look at them.
template <int kCount>
__device__ __forceinline__ void accumulator_fence(float (&sums)[kCount]) {
#if defined(PKT_EXT_EMULATED)
  emulation::require_nothing_deferred();
#elif defined(PKT_HOPPER)
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sums[i])::"memory");
#else
  __trap();
#endif
}

#if defined(PKT_EXT_EMULATED)
namespace twin {
// Element [k][col] of the operand that a descriptor names: the canonical layout of a matrix whose
// columns are contiguous ("MN-major"), or whose depth is ("K-major"), with 128-byte swizzling.
template <typename T, bool kDepthContiguous>
float operand(uint64_t descriptor, int k, int col) {
  if (descriptor >> 62 != 1) throw std::runtime_error("wgmma: expected 128-byte swizzling");
  const auto start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const auto leading = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4;
  const auto stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  const uint32_t address =
      kDepthContiguous ? start + col / 8 * stride + col % 8 * 128 + k * 2
                       : start + col / 64 * leading + k / 8 * stride + k % 8 * 128 + col % 64 * 2;
  T value;
  std::memcpy(&value, static_cast<const char*>(emulation::shared_memory()) + swizzled_128(address),
              sizeof value);
  return to_float(value);
}

template <typename T, bool kDepthContiguous>
void wgmma(float* sums, uint64_t a, uint64_t b, bool add, int thread) {
  const auto at = operand<T, kDepthContiguous>;
  const int row = thread / 32 * 16 + thread % 32 / 4, first_col = thread % 4 * 2;
  for (int i = 0; i < 96 && !add; ++i) sums[i] = 0.0f;
  for (int k = 0; k < 16; ++k) {
    const float rows[2] = {at(a, k, row), at(a, k, row + 8)};
    for (int i = 0; i < 96; i += i % 2 ? 3 : 1) {  // two columns of every eight
      const float col = at(b, k, i / 4 * 8 + first_col + i % 2);
      sums[i] += rows[0] * col;
      sums[i + 2] += rows[1] * col;
    }
  }
}
}  // namespace twin
#endif

// sums (+)= A^T B, A 16 x 64 and B 16 x 192, by the 128 threads of a warpgroup; without `add` what
// `sums` held does not count. With thread t of the warpgroup, g = t % 32 / 4:
//   sums[i] is [16 (t / 32) + g + 8 (i / 2 % 2)][8 (i / 4) + 2 (t % 4) + i % 2].
template <typename T, bool kDepthContiguous = false>
__device__ __forceinline__ void wgmma_m64n192k16(float (&sums)[96], uint64_t a, uint64_t b,
                                                 bool add) {
#if defined(PKT_EXT_EMULATED)
  const int thread = static_cast<int>(threadIdx.x % 128);
  emulation::defer(
      [&sums, a, b, add, thread] { twin::wgmma<T, kDepthContiguous>(sums, a, b, add, thread); });
#elif defined(PKT_HOPPER)
#define PKT_S8(n)                                                                            \
  "+f"(sums[n]), "+f"(sums[n + 1]), "+f"(sums[n + 2]), "+f"(sums[n + 3]), "+f"(sums[n + 4]), \
      "+f"(sums[n + 5]), "+f"(sums[n + 6]), "+f"(sums[n + 7])
#define PKT_WGMMA(type)                                                                   \
  asm volatile(                                                                           \
      "{\n"                                                                               \
      ".reg .pred add;\n"                                                                 \
      "setp.ne.b32 add, %98, 0;\n"                                                        \
      "wgmma.mma_async.sync.aligned.m64n192k16.f32." type "." type                        \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "  \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "  \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "  \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "  \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, " \
      "%96, %97, add, 1, 1, %99, %99;\n"                                                  \
      "}"                                                                                 \
      : PKT_S8(0), PKT_S8(8), PKT_S8(16), PKT_S8(24), PKT_S8(32), PKT_S8(40), PKT_S8(48), \
        PKT_S8(56), PKT_S8(64), PKT_S8(72), PKT_S8(80), PKT_S8(88)                        \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(kDepthContiguous ? 0 : 1))
  if constexpr (std::is_same_v<T, half>) {
    PKT_WGMMA("f16");
  } else {
    PKT_WGMMA("bf16");
  }
#undef PKT_WGMMA
#undef PKT_S8
#else
  __trap();
#endif
}

// Registers of each thread of the warpgroup from here on: fewer, or more that others have given up.
template <int kCount>
__device__ __forceinline__ void give_registers() {
#if defined(PKT_HOPPER)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}
template <int kCount>
__device__ __forceinline__ void take_registers() {
#if defined(PKT_HOPPER)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

}  // namespace pkt::cuda
