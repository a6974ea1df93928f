// SPDX-License-Identifier: Apache-2.0
// The correction of neuron scores from a panel of products, on the CPU.
//
// A task is a few rows (neurons) of the panel; a row goes through by blocks of 512 tokens that stay
// in the L1 while every sample uses them. Within a block 16 float32 lanes, blocks in float64, all
// in an order that depends on shapes alone. Shifts above 16 are rare: a block that has any leaves
// them out of its lanes and adds them in float64, the probability in the exponent. Bound:
// arithmetic, about 25 operations an element and sample, beside the 2 d of the product.
#include <cmath>

#include "core/parallel.h"
#include "neuron_score/gain.h"
#include "neuron_score/neuron_score.h"

namespace pkt {
namespace {

constexpr int64_t kBlock = 512;
constexpr int64_t kLanes = 16;
constexpr int64_t kRowsPerTask = 8;
constexpr int64_t kAlone = 1 << 15;  // elements below which waking threads costs more

// A block of one sample's tokens beside a row's products. `slope` and `tanh` only where capped.
struct Block {
  const float *product, *prob, *log_prob, *tanh, *slope;
};

template <bool kCapped>
inline float shift_of(const Block& b, int64_t j, float scale, float centre, float cap) {
  const float change = scale * b.product[j];
  if constexpr (kCapped) return capped_change(change, cap, b.tanh[j], b.slope[j]) - centre;
  return change - centre;
}

template <bool kCapped>
PKT_SIMD_CLONES double block_sum(const Block& b, float scale, float centre, float cap) {
  float lanes[kLanes] = {};
  uint32_t large[kLanes] = {};
  for (int64_t j = 0; j < kBlock; j += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float x = shift_of<kCapped>(b, j + lane, scale, centre, cap);
      large[lane] |= x > kLargeShift ? 1u : 0u;
      const float small = x > kLargeShift ? 0.0f : x;
      const float term = exp_excess(small) + (kCapped ? small : 0.0f);
      lanes[lane] += b.prob[j + lane] * term;
    }
  }
  double sum = 0.0;
  uint32_t any = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    sum += lanes[lane];
    any |= large[lane];
  }
  for (int64_t j = 0; any && j < kBlock; ++j) {
    const double x = shift_of<kCapped>(b, j, scale, centre, cap);
    if (!(x > kLargeShift)) continue;
    sum += std::exp(x + b.log_prob[j]) - double{b.prob[j]} * (kCapped ? 1.0 : 1.0 + x);
  }
  return sum;
}

// The last tokens, fewer than a block: copies with a probability of zero, in the exponent too,
// beyond them.
struct Tail {
  float planes[4][kBlock] = {};

  Tail(const NeuronScoreParams& p, int64_t sample, int64_t left, int count) {
    for (float& log_prob : planes[kLogProb]) log_prob = -HUGE_VALF;
    for (int which = 0; which < count; ++which) {
      const float* from = p.plane(sample, which) + left;
      for (int64_t j = left; j < p.columns; ++j) planes[which][j - left] = from[j - left];
    }
  }
};

template <bool kCapped>
void add_row(const NeuronPanelParams& q, int64_t row) {
  constexpr int kPlanes = kCapped ? 4 : 2;
  const NeuronScoreParams& p = q.score;
  const float* products = q.panel + row * q.panel_stride;
  for (int64_t left = 0; left < p.columns; left += kBlock) {
    const bool ragged = left + kBlock > p.columns;
    float last[kBlock] = {};
    for (int64_t j = left; ragged && j < p.columns; ++j) last[j - left] = products[j];
    for (int64_t sample = 0; sample < p.samples; ++sample) {
      const float scale = p.scale(sample, row), centre = p.centre(sample, row);
      if (scale == 0.0f) continue;
      double& sum = p.sums[sample * p.rows + row];
      if (ragged) {
        const Tail tail(p, sample, left, kPlanes);
        sum += block_sum<kCapped>(Block{last, tail.planes[kProb], tail.planes[kLogProb],
                                        tail.planes[kTanh], tail.planes[kSlope]},
                                  scale, centre, p.cap);
        continue;
      }
      const auto plane = [&](int which) {
        return which < kPlanes ? p.plane(sample, which) + left : nullptr;
      };
      sum += block_sum<kCapped>(
          Block{products + left, plane(kProb), plane(kLogProb), plane(kTanh), plane(kSlope)}, scale,
          centre, p.cap);
    }
  }
}

}  // namespace

void neuron_panel_cpu(const NeuronPanelParams& q, int threads) {
  const int64_t rows = q.score.rows;
  const int used = rows * q.score.columns * q.score.samples < kAlone ? 1 : threads;
  parallel_for(used, ceil_div(rows, kRowsPerTask), [&](int64_t task) {
    const int64_t first = task * kRowsPerTask;
    for (int64_t row = first; row < rows && row < first + kRowsPerTask; ++row) {
      q.score.cap > 0.0f ? add_row<true>(q, row) : add_row<false>(q, row);
    }
  });
}

}  // namespace pkt
