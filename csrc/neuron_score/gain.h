// SPDX-License-Identifier: Apache-2.0
// The elementwise part of neuron scores, one source for the CPU, CUDA and its emulation: float32,
// without branches, so that compilers vectorise it.
#pragma once

#include "core/dtype.h"

namespace pkt {

// Above this shift exp(x) - 1 - x is not formed: the probability goes into the exponent instead.
constexpr float kLargeShift = 16.0f;

PKT_HOST_DEVICE float at_least(float value, float least) {
  return value < least ? least : value;  // NaN stays
}

// exp(x) - 1 - x for x <= 64, within 1e-6 of itself, for any small x. With x = n ln 2 + r and
// exp(r) = 1 + r + r^2 q it is 2^n r^2 q + (2^n - 1) (1 + r) - n ln 2: for n = 0 the first term is
// all, and nothing cancels.
PKT_HOST_DEVICE float exp_excess(float x) {
  constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // the high part has 9 bits
  constexpr float kRound = 0x1.8p23f;        // adding it rounds to a whole number, in the low bits
  const float within = at_least(x, -80.0f);  // below, exp(x) is nothing beside -1 - x
  const float shifted = within * kLog2e + kRound;
  const float n = shifted - kRound;
  const float r = within - n * kLn2High - n * kLn2Low;
  const float power = bits_to_float((float_to_bits(shifted) << 23) + 0x3f800000u);  // 2^n
  // Taylor's terms to r^7 leave 2e-9 of the sum for |r| <= ln 2 / 2
  float q = 1.0f / 5040.0f;
  q = q * r + 1.0f / 720.0f;
  q = q * r + 1.0f / 120.0f;
  q = q * r + 1.0f / 24.0f;
  q = q * r + 1.0f / 6.0f;
  q = q * r + 0.5f;
  const float rest = (power - 1.0f) * (1.0f + r) - n * kLn2;
  return power * (r * r * q) + rest + (within - x);
}

// What soft-capping makes of a logit's change: cap tanh(u + h) - cap tanh(u) for h = change / cap,
// from tanh(u) and its slope 1 - tanh(u)^2; a small change keeps its digits.
PKT_HOST_DEVICE float capped_change(float change, float cap, float tanh_u, float slope) {
  float twice = 2.0f * change / cap;
  twice = twice > 18.0f ? 18.0f : twice;  // where tanh is 1 in float32
  twice = twice < -18.0f ? -18.0f : twice;
  const float grown = exp_excess(twice) + twice;  // exp(2h) - 1
  const float tanh_h = grown / (grown + 2.0f);
  return cap * (tanh_h * slope) / (1.0f + tanh_u * tanh_h);
}

// A token's planes, as the tensor `tokens` holds them.
enum TokenPlane { kProb, kLogProb, kTanh, kSlope };

}  // namespace pkt
