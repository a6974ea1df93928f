// SPDX-License-Identifier: Apache-2.0
// The one way a kernel is launched: sizes checked, errors turned into exceptions, and the same
// source runs under the host emulation of tests/emulation.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace pkt::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
  }
}

// Launches kernel<<<grid, block, smem, stream>>>(args...); `smem` in bytes of dynamic shared
// memory.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem, cudaStream_t stream,
            Args... args) {
#if defined(PKT_EXT_EMULATED)
  emulation::run(grid, block, smem, [&] { kernel(static_cast<Params>(args)...); });
#else
  if (smem > 48 * 1024) {  // above the default limit a kernel must opt in
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(smem)),
          "cudaFuncSetAttribute");
  }
  // clang-format off
  kernel<<<grid, block, smem, stream>>>(static_cast<Params>(args)...);
  // clang-format on
  check(cudaGetLastError(), "kernel launch");
#endif
}

// A block's dynamic shared memory. Kernels use no other shared memory, so that the emulation can
// poison it before every block.
template <typename T>
__device__ __forceinline__ T* shared_memory() {
#if defined(PKT_EXT_EMULATED)
  return static_cast<T*>(emulation::shared_memory());
#else
  extern __shared__ __align__(16) unsigned char pkt_shared_memory[];
  return reinterpret_cast<T*>(pkt_shared_memory);
#endif
}

// Bytes of dynamic shared memory a block may have on the current device.
inline int64_t shared_memory_limit() {
#if defined(PKT_EXT_EMULATED)
  return emulation::shared_memory_limit;
#else
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  return bytes;
#endif
}

__host__ __device__ __forceinline__ int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace pkt::cuda
