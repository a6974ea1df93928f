// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies from global to shared memory (cp.async). A thread's copies form groups; data
// may land at any time and is there for the thread after the wait that covers its group, for the
// others after a barrier that follows. Before sm_80 a copy is done when it is issued.
#pragma once

#include "core/cuda/launch.cuh"

namespace pkt::cuda {

// 16 bytes, past the L1 cache: the first `bytes` of them are those at `from`, the rest zero;
// nothing is read where `bytes` is 0. Both addresses are multiples of 16.
__device__ __forceinline__ void copy_async_16(void* to_shared, const void* from, int bytes) {
#if defined(PKT_EXT_EMULATED)
  if (reinterpret_cast<uintptr_t>(to_shared) % 16 || reinterpret_cast<uintptr_t>(from) % 16) {
    throw std::runtime_error("copy_async_16: an address is no multiple of 16");
  }
  emulation::copy_async(to_shared, from, static_cast<size_t>(bytes), 16);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to_shared))),
               "l"(from), "r"(bytes)
               : "memory");
#else
  if (bytes == 16) {
    *static_cast<uint4*>(to_shared) = *static_cast<const uint4*>(from);
    return;
  }
  for (int i = 0; i < 16; ++i) {
    static_cast<char*>(to_shared)[i] = i < bytes ? static_cast<const char*>(from)[i] : 0;
  }
#endif
}

__device__ __forceinline__ void copy_async_commit() {
#if defined(PKT_EXT_EMULATED)
  emulation::copy_async_commit();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until all groups of this thread but the last kPending have landed.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
#if defined(PKT_EXT_EMULATED)
  emulation::copy_async_wait(kPending);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace pkt::cuda
