// SPDX-License-Identifier: Apache-2.0
// Chooses the kernel that multiplies neurons and head, and adds up what its runs leave.
#include "core/cuda/hopper.cuh"
#include "core/cuda/mma.cuh"
#include "neuron_score/product_cuda.h"

namespace pkt {
namespace {

constexpr int kThreads = 128;

// sums += the slots of all runs, in ascending order.
__global__ void __launch_bounds__(kThreads)
    finish_runs(NeuronProductParams p, NeuronProductGrid grid) {
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= p.score.rows) return;
  const int64_t slot_rows = grid.slot_rows();
  for (int64_t sample = 0; sample < p.score.samples; ++sample) {
    double sum = 0.0;
    for (int64_t slot = 0; slot < grid.runs * grid.parts; ++slot) {
      sum += p.workspace[(slot * p.score.samples + sample) * slot_rows + row];
    }
    p.score.sums[sample * p.score.rows + row] += sum;
  }
}

}  // namespace

bool neuron_product_runs(NeuronProduct which) {
  return which == NeuronProduct::kMma ? cuda::has_tensor_cores() : cuda::is_hopper();
}

void neuron_product_cuda(const NeuronProductParams& p, NeuronProduct which, void* stream) {
  const NeuronProductGrid grid = neuron_product_grid(p.score, which);
  which == NeuronProduct::kMma ? neuron_product_mma(p, grid, stream)
                               : neuron_product_wgmma(p, grid, stream);
  const dim3 blocks(static_cast<unsigned>(cuda::ceil_div(p.score.rows, kThreads)));
  cuda::launch(finish_runs, blocks, dim3(kThreads), 0, static_cast<cudaStream_t>(stream), p, grid);
}

}  // namespace pkt
