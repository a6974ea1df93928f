// SPDX-License-Identifier: Apache-2.0
// The correction of neuron scores from a panel of products, on the GPU: for float32 heads, whose
// products a library forms, and devices without tensor cores.
//
// A warp owns a row (neuron) and passes it once a sample, a lane every 32nd token; the row stays in
// the cache between samples. Lanes add in float64 and meet in a fixed tree: equal bits in every
// run. Bound: arithmetic, about 25 instructions an element and sample.
#include "core/cuda/reduce.cuh"
#include "neuron_score/gain.h"
#include "neuron_score/neuron_score.h"
#include "neuron_score/term.cuh"

namespace pkt {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = kThreads / 32;  // of a block

template <bool kCapped>
__global__ void __launch_bounds__(kThreads) add_panel(NeuronPanelParams q) {
  const NeuronScoreParams& p = q.score;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.x / 32;
  if (row >= p.rows) return;
  const float* products = q.panel + row * q.panel_stride;
  for (int64_t sample = 0; sample < p.samples; ++sample) {
    const float scale = p.scale(sample, row), centre = p.centre(sample, row);
    if (scale == 0.0f) continue;
    const Planes<kCapped> planes(p, sample);
    double sum = 0.0;
    for (int64_t j = lane; j < p.columns; j += 32) {
      sum += planes.term(j, products[j], scale, centre, p.cap);
    }
    sum = cuda::warp_sum(sum);
    if (lane == 0) p.sums[sample * p.rows + row] += sum;
  }
}

}  // namespace

void neuron_panel_cuda(const NeuronPanelParams& q, void* stream) {
  const dim3 grid(static_cast<unsigned>(cuda::ceil_div(q.score.rows, kRows)));
  const auto run = [&](auto kernel) {
    cuda::launch(kernel, grid, dim3(kThreads), 0, static_cast<cudaStream_t>(stream), q);
  };
  q.score.cap > 0.0f ? run(add_panel<true>) : run(add_panel<false>);
}

}  // namespace pkt
