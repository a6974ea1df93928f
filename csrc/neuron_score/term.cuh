// SPDX-License-Identifier: Apache-2.0
// One token's term of a neuron's correction, on the GPU.
#pragma once

#include <cmath>

#include "core/cuda/launch.cuh"
#include "neuron_score/gain.h"
#include "neuron_score/neuron_score.h"

namespace pkt {

// A sample's tokens.
template <bool kCapped>
struct Planes {
  const float *prob, *log_prob, *tanh, *slope;

  __device__ __forceinline__ Planes(const NeuronScoreParams& p, int64_t sample)
      : prob(p.plane(sample, kProb)),
        log_prob(p.plane(sample, kLogProb)),
        tanh(kCapped ? p.plane(sample, kTanh) : nullptr),
        slope(kCapped ? p.plane(sample, kSlope) : nullptr) {}

  // From the product a_iv; rarely a shift is so large that the probability goes into the exponent.
  __device__ __forceinline__ float term(int64_t token, float product, float scale, float centre,
                                        float cap) const {
    float x = scale * product;
    if constexpr (kCapped) x = capped_change(x, cap, tanh[token], slope[token]);
    x -= centre;
    const float p = prob[token];
    if (x > kLargeShift) return expf(x + log_prob[token]) - p * (kCapped ? 1.0f : 1.0f + x);
    return p * (exp_excess(x) + (kCapped ? x : 0.0f));
  }
};

}  // namespace pkt
