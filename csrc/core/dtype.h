// SPDX-License-Identifier: Apache-2.0
// Element types as stored, and their conversion to the type the kernels compute in.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define PKT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PKT_HOST_DEVICE inline
#endif

namespace pkt {

enum class DType { f32, f64, f16, bf16, i64, i32, u8 };

// 16-bit floats as bit patterns: one type for host, device and emulation.
struct half {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

PKT_HOST_DEVICE float bits_to_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

PKT_HOST_DEVICE uint32_t float_to_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

PKT_HOST_DEVICE float to_float(float value) {
  return value;
}
PKT_HOST_DEVICE float to_float(bfloat16 value) {
  return bits_to_float(uint32_t{value.bits} << 16);
}
PKT_HOST_DEVICE float to_float(half value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  // Subnormals come out right because the multiplication by 2^112 renormalises them; exponent 31
  // (inf, nan) overflows that product's range on purpose and is patched after it.
  const uint32_t magnitude = uint32_t{value.bits} << 13 & 0x0fffe000u;
  const uint32_t sign = uint32_t{value.bits} << 16 & 0x80000000u;
  const float scaled = bits_to_float(magnitude) * 0x1p112f;
  const uint32_t special = (value.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return bits_to_float(float_to_bits(scaled) | special | sign);
#endif
}

PKT_HOST_DEVICE double to_double(double value) {
  return value;
}
template <typename T>
PKT_HOST_DEVICE double to_double(T value) {
  return static_cast<double>(to_float(value));
}

// Round to nearest, ties to even; NaN stays a quiet NaN.
PKT_HOST_DEVICE void from_float(float value, float& out) {
  out = value;
}
PKT_HOST_DEVICE void from_float(float value, bfloat16& out) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out.bits = static_cast<uint16_t>(bits >> 16 | 0x40u);
    return;
  }
  out.bits = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
PKT_HOST_DEVICE void from_float(float value, half& out) {
#if defined(__CUDA_ARCH__)
  out.bits = __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    out.bits = sign | 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds past the largest half
    out.bits = sign | 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal half: let one float addition do the rounding
    const float shifted = bits_to_float(magnitude) + 0x1p-1f;
    out.bits = sign | static_cast<uint16_t>(float_to_bits(shifted) - 0x3f000000u);
  } else {
    const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
    out.bits = sign | static_cast<uint16_t>((rounded - 0x38000000u) >> 13);
  }
#endif
}

// Calls body(value of the dtype's type); outside of parallel_for, whose body must not throw.
template <typename Body>
void with_float_type(DType dtype, const Body& body) {
  if (dtype == DType::f32) return body(float{});
  if (dtype == DType::f16) return body(half{});
  if (dtype == DType::bf16) return body(bfloat16{});
  throw std::logic_error("a dtype the binding does not admit");
}

}  // namespace pkt
