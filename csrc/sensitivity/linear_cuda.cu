// SPDX-License-Identifier: Apache-2.0
// Chooses the kernel of linear_sensitivity on the GPU.
#include "core/cuda/mma.cuh"
#include "sensitivity/epilogue.cuh"
#include "sensitivity/linear_cuda.h"

namespace pkt {

using cuda::ceil_div;

int64_t linear_sensitivity_workspace_cuda(const LinearSensitivityParams& p) {
  // of the smallest tile; the others need less
  return Outputs(p.score, p.out_features, p.in_features, p.sums, kSumBlock, nullptr).slots.bytes;
}

void linear_sensitivity_cuda(const LinearSensitivityParams& p, void* stream) {
  const bool tensor_cores = p.variant < 0 ? cuda::has_tensor_cores() : p.variant >= 2;
  if (tensor_cores && p.rows < int64_t{1} << 31) {  // their rows are counted in 32 bits
    if (p.variant == 3 && linear_wgmma_takes(p)) return linear_wgmma_cuda(p, stream);
    return linear_mma_takes(p) ? linear_mma_cuda(p, stream) : linear_split_cuda(p, stream);
  }
  // Large tiles read less; small ones leave fewer multiprocessors idle. A fixed number rather than
  // the device's count decides, four tiles for each of 64.
  const int64_t large = ceil_div(p.in_features, 128) * ceil_div(p.out_features, 128);
  linear_fma_cuda(p, p.variant < 0 ? large >= 256 : p.variant > 0, stream);
}

}  // namespace pkt
