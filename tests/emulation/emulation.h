// SPDX-License-Identifier: Apache-2.0
// The CUDA execution model on the host: blocks one after another, the threads of a block as fibers
// that switch at barriers and warp exchanges. See emulation.cpp for what it checks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) {
  return "emulated error";
}

namespace emulation {

enum class Order { ascending, descending, random };

// Order in which fibers are resumed between two barriers; `seed` matters for random alone.
void set_order(Order order, uint64_t seed);

// Runs `body` once per thread of every block. Throws std::runtime_error when threads of a block or
// warp wait at different barriers for ever.
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);

// The running block's dynamic shared memory; filled with 0xFF (NaN in every float type) at its
// start.
void* shared_memory();

// Bytes of it a block may have: 227 KB, or what a test sets. A launch that wants more throws.
extern int64_t shared_memory_limit;

void block_barrier();
// Publishes `value` (at most 8 bytes) to the lanes of `mask` and returns lane `source`'s value, or
// the caller's own where `source` is outside the warp.
uint64_t exchange(unsigned mask, uint64_t value, int source);
// Every lane's predicate as a bit mask.
unsigned ballot(unsigned mask, bool predicate);

// What the 32 lanes of a warp do as one: `serve` runs once, with every lane's `operands`. Throws
// unless all 32 take part, in the same operation.
using Serve = void (*)(void* const* lanes);
void warp_collective(void* operands, Serve serve);

// Copies that land when they are waited for, and not before: until then the destination is poison.
// `to` gets `bytes` bytes of `from`, then zeros up to `filled`. A thread that ends without having
// waited for its copies is an error.
void copy_async(void* to, const void* from, size_t bytes, size_t filled);
void copy_async_commit();
// All groups committed by this thread land, but for the last `pending`.
void copy_async_wait(size_t pending);

// __syncthreads among the first `threads` that reach it under this id.
void named_barrier(int id, int threads);

// Barriers that also count bytes, known by their address: a phase ends when `count` threads have
// arrived and as many bytes have landed as they announced. `land` runs, and its bytes count, when a
// thread waits at the barrier, and not before.
void transaction_barrier_init(const void* barrier, unsigned count);
void transaction_barrier_arrive(const void* barrier, unsigned bytes_announced);
void transaction_later(const void* barrier, unsigned bytes, std::function<void()> land);
void transaction_barrier_wait(const void* barrier, unsigned parity);

// Work of this thread that is done when it waits for it, and not before. A thread that ends without
// having done so is an error.
void defer(std::function<void()> work);
void run_deferred();
void require_nothing_deferred();

template <typename T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8, "shuffles move at most eight bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(mask, bits, source);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline int lane() {
  return static_cast<int>((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) %
                          32);
}

}  // namespace emulation

inline void __syncthreads() {
  emulation::block_barrier();
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulation::ballot(mask, true);
}

// A segment of `width` lanes is a warp of its own; a source outside it returns the caller's value.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int base = emulation::lane() / width * width;
  return emulation::shuffle(mask, value, base + source % width);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = emulation::lane();
  const int source = lane - static_cast<int>(delta);
  return emulation::shuffle(mask, value, source < lane / width * width ? lane : source);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = emulation::lane();
  const int source = lane + static_cast<int>(delta);
  return emulation::shuffle(mask, value, source >= lane / width * width + width ? lane : source);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = emulation::lane();
  const int source = lane ^ bits;
  return emulation::shuffle(mask, value, source >= lane / width * width + width ? lane : source);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return emulation::ballot(mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) {
  return emulation::ballot(mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return emulation::ballot(mask, predicate != 0) == mask;
}

// Blocks and fibers run one at a time, so an atomic is a plain update.
template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
template <typename T>
T atomicOr(T* address, T value) {
  const T old = *address;
  *address = old | value;
  return old;
}
