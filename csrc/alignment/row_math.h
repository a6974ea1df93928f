// SPDX-License-Identifier: Apache-2.0
// The elementwise part of the row losses, one source for the CPU, CUDA and its emulation: float32,
// without branches, so that compilers vectorise it.
#pragma once

#include <cmath>

#include "core/dtype.h"

namespace pkt {

constexpr float kLog2e = 1.44269504f;
constexpr float kLowest = -3.40282347e38f;  // what a maximum starts from

// 2^x for x <= 0, within 2^-22.5 of itself; 0 below -126.5; NaN stays.
PKT_HOST_DEVICE float exp2_of(float x) {
#if defined(__CUDA_ARCH__)
  return exp2f(x);  // the special function unit: 2^-22 of itself
#else
  constexpr float kRound = 0x1.8p23f;  // adding it rounds to a whole number, in the low bits
  const float within = x < -127.0f ? -127.0f : x;
  const float shifted = within + kRound;
  const float f = within - (shifted - kRound);
  const float power = bits_to_float((float_to_bits(shifted) + 127u) << 23);  // 0 for -127
  // minimax on |f| <= 1/2, exact at 0: 2^-28.9 of 2^f
  float rise = 1.53533625e-4f;
  rise = rise * f + 1.33988744e-3f;
  rise = rise * f + 9.61843736e-3f;
  rise = rise * f + 5.55033247e-2f;
  rise = rise * f + 2.40226479e-1f;
  rise = rise * f + 6.93147203e-1f;
  return power * (1.0f + rise * f);
#endif
}

// tanh, within 2^-21 of itself; NaN stays.
PKT_HOST_DEVICE float tanh_of(float x) {
  const float size = x < 0.0f ? -x : x;
  const float fade = exp2_of(size * (-2.0f * kLog2e));
  // where 1 - fade would cancel, Taylor's terms to x^9
  const float s = x * x;
  const float small =
      1.0f +
      s * (-1.0f / 3.0f + s * (2.0f / 15.0f + s * (-17.0f / 315.0f + s * (62.0f / 2835.0f))));
  const float large = (1.0f - fade) / (1.0f + fade);
  return size < 0.25f ? x * small : (x < 0.0f ? -large : large);
}

// What remains of a logit's slope under a cap, from the capped logit.
PKT_HOST_DEVICE float cap_slope(float capped, float cap) {
  const float tanh = capped / cap;
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
struct Divergence {
  float loss, slope;
};

PKT_HOST_DEVICE Divergence divergence(float student, float teacher, const Softmax& q,
                                      const Softmax& p, float inverse_temperature,
                                      float log_shares) {
  const float a = teacher - p.top, b = student - q.top;
  const float prob = exp2_of(a * p.rate) * p.share;
  const float other = exp2_of(b * q.rate) * q.share;
  const float r = (a - b) * inverse_temperature + log_shares;  // log of the shares' ratio
  // exp(-r) - 1 + r for |r| < 1/2, within 2^-20 of itself
  float part = -1.0f / 5040.0f;
  part = part * r + 1.0f / 720.0f;
  part = part * r - 1.0f / 120.0f;
  part = part * r + 1.0f / 24.0f;
  part = part * r - 1.0f / 6.0f;
  part = part * r + 0.5f;
  part = part * (r * r);
  const bool close = r < 0.5f && r > -0.5f;
  const float change = other - prob;
  return {close ? prob * part : prob * r + change, close ? prob * (part - r) : change};
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
