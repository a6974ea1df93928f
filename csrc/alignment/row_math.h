// SPDX-License-Identifier: Apache-2.0
// The elementwise part of the row losses, one source for the CPU, CUDA and its emulation: float32,
// without branches. F is float, or on the CPU a vector of them.
#pragma once

#include <cmath>

#include "core/dtype.h"

namespace pkt {

constexpr float kLog2e = 1.44269504f;
constexpr float kLowest = -3.40282347e38f;  // what a maximum starts from

#if defined(__CUDACC__)
#define PKT_ELEMENTWISE PKT_HOST_DEVICE
#else
#define PKT_ELEMENTWISE __attribute__((always_inline)) inline
#endif

// 2^n from 1.5 * 2^23 + n, whose low bits hold n; 0 for n = -127.
PKT_ELEMENTWISE float power_of_two(float shifted) {
  return bits_to_float((float_to_bits(shifted) + 127u) << 23);
}

#if !defined(__CUDACC__)
typedef float Lanes __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed inline only
PKT_ELEMENTWISE Lanes power_of_two(Lanes shifted) {
  return (Lanes)(((Words)shifted + 127u) << 23);
}
#pragma GCC diagnostic pop
#endif

// 2^x for x <= 0, within 2^-22.5 of itself; 0 below -126.5; NaN stays.
template <typename F>
PKT_ELEMENTWISE F exp2_of(F x) {
#if defined(__CUDA_ARCH__)
  return exp2f(x);  // the special function unit: 2^-22 of itself
#else
  constexpr float kRound = 0x1.8p23f;  // adding it rounds to a whole number
  const F within = x < -127.0f ? -127.0f : x;
  const F shifted = within + kRound;
  const F f = within - (shifted - kRound);
  // minimax on |f| <= 1/2, exact at 0: 2^-28.9 of 2^f
  F rise = 1.53533625e-4f * f + 1.33988744e-3f;
  rise = rise * f + 9.61843736e-3f;
  rise = rise * f + 5.55033247e-2f;
  rise = rise * f + 2.40226479e-1f;
  rise = rise * f + 6.93147203e-1f;
  return power_of_two(shifted) * (1.0f + rise * f);
#endif
}

// tanh, within 2^-21 of itself; NaN stays.
template <typename F>
PKT_ELEMENTWISE F tanh_of(F x) {
  const F size = x < 0.0f ? -x : x;
  const F fade = exp2_of(size * (-2.0f * kLog2e));
  // where 1 - fade would cancel, Taylor's terms to x^9
  const F s = x * x;
  F small = (62.0f / 2835.0f) * s - 17.0f / 315.0f;
  small = small * s + 2.0f / 15.0f;
  small = small * s - 1.0f / 3.0f;
  small = small * s + 1.0f;
  const F large = (1.0f - fade) / (1.0f + fade);
  return size < 0.25f ? x * small : (x < 0.0f ? -large : large);
}

// What remains of a logit's slope under a cap, from the capped logit.
template <typename F>
PKT_ELEMENTWISE F cap_slope(F capped, float cap) {
  const F tanh = capped / cap;
  return 1.0f - tanh * tanh;
}

// A distribution as it is read off capped logits: exp2_of((z - top) * rate) * share.
struct Softmax {
  float top;    // the largest logit
  float rate;   // log2(e) / tau
  float share;  // 1 / the sum of exponentials
};

// A softmax's running maximum, and sums of exponentials relative to it.
struct Online {
  float top = kLowest;
  double sum = 0.0;
  double weighted = 0.0;  // each times the token's D

  PKT_HOST_DEVICE void raise(float above, float rate) {
    if (!(above > top)) return;
#if defined(__CUDA_ARCH__)
    const double fade = exp2_of((top - above) * rate);  // float64 is rare on some devices
#else
    const double fade = std::exp2(double{rate} * (double{top} - double{above}));
#endif
    sum *= fade;
    weighted *= fade;
    top = above;
  }
  PKT_HOST_DEVICE Softmax softmax(float rate) const {
    return {top, rate, static_cast<float>(1.0 / sum)};
  }
};

// One token's part of the divergence of two distributions, and its derivative by the second one's
// logit over tau. With r = log(p / q) that is p r - p + q, of which no token's is negative: equal
// distributions give exactly 0, and where they are close nothing cancels.
template <typename F>
struct Divergence {
  F loss, slope;
};

template <typename F>
PKT_ELEMENTWISE Divergence<F> divergence(F student, F teacher, const Softmax& q, const Softmax& p,
                                         float inverse_temperature, float log_shares) {
  const F a = teacher - p.top, b = student - q.top;
  const F prob = exp2_of(a * p.rate) * p.share;
  const F other = exp2_of(b * q.rate) * q.share;
  const F r = (a - b) * inverse_temperature + log_shares;  // log of the shares' ratio
  // exp(-r) - 1 + r for |r| < 1/2, within 2^-20 of itself
  F part = (-1.0f / 5040.0f) * r + 1.0f / 720.0f;
  part = part * r - 1.0f / 120.0f;
  part = part * r + 1.0f / 24.0f;
  part = part * r - 1.0f / 6.0f;
  part = part * r + 0.5f;
  const F square = r * r, change = other - prob;
  part = part * square;
  return {square < 0.25f ? prob * part : prob * r + change,
          square < 0.25f ? prob * (part - r) : change};
}

// Cross-entropy from the label's logit and the others' exponentials (at tau = 1): where the label
// has nearly all the probability, nothing cancels.
struct Choice {
  Softmax all;
  double loss;
  float missing;  // 1 - the label's probability
};

PKT_HOST_DEVICE Choice choose(float chosen, const Online& others) {
  const double ahead = others.sum > 0.0 ? double{others.top} + log(others.sum) - double{chosen}
                                        : -1e300;  // the label is the only token
  Online all = others;
  all.raise(chosen, kLog2e);
  all.sum += exp(double{chosen} - double{all.top});
  const double loss = (ahead > 0.0 ? ahead : 0.0) + log1p(exp(-fabs(ahead)));
  return {all.softmax(kLog2e), loss, static_cast<float>(1.0 / (1.0 + exp(-ahead)))};
}

// The cosine to a label's one-hot vector: gradient factor * logit, and at the label what is left
// of it less 1 / norm.
struct OneHotCosine {
  double loss;
  float factor, at_label;
};

PKT_HOST_DEVICE OneHotCosine one_hot_cosine(float chosen, double square) {
  if (square == 0.0) return {1.0, 0.0f, 0.0f};
  const double norm = sqrt(square), c = chosen;
  return {1.0 - c / norm + (square - square),  // NaN where the square is infinite
          static_cast<float>(c / (norm * square)),
          static_cast<float>((c * c - square) / (norm * square))};
}

}  // namespace pkt
