// SPDX-License-Identifier: Apache-2.0
// The kernels that linear_sensitivity_cuda chooses from.
#pragma once

#include "sensitivity/sums.h"

namespace pkt {

// Float32 FMAs; tiles of 128 where `wide`, else 64. Any dtype, any strides.
void linear_fma_cuda(const LinearSensitivityParams& params, bool wide, void* stream);
// Tensor cores; 16-bit operands whose rows are contiguous and start at
// multiples of 16 bytes.
bool linear_mma_takes(const LinearSensitivityParams& params);
void linear_mma_cuda(const LinearSensitivityParams& params, void* stream);
// Tensor cores; any dtype, float32 as sums of two bfloat16; any strides.
void linear_split_cuda(const LinearSensitivityParams& params, void* stream);
// sm_90a: what linear_mma_cuda takes, on a device that is one.
bool linear_wgmma_takes(const LinearSensitivityParams& params);
void linear_wgmma_cuda(const LinearSensitivityParams& params, void* stream);

}  // namespace pkt
