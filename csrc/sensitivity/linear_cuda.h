// SPDX-License-Identifier: Apache-2.0
// The kernels that linear_sensitivity_cuda chooses from.
#pragma once

#include "sensitivity/sums.h"

namespace pkt {

// Float32 FMAs; tiles of 128 where `wide`, else 64. Any dtype, any strides.
void linear_fma_cuda(const LinearSensitivityParams& params, bool wide, void* stream);

}  // namespace pkt
