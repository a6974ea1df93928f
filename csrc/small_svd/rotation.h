// SPDX-License-Identifier: Apache-2.0
// One-sided Jacobi's decisions, the same on the CPU and on a GPU: who meets whom, and by which
// angle.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/dtype.h"

namespace pkt::jacobi {

// Columns are scaled by a power of two that brings the largest entry to 2^kTop, so that squares of
// the largest stay finite and those of columns 2^-kRange below them stay normal.
template <typename T>
struct Range;
template <>
struct Range<float> {
  static constexpr int kTop = 50;
  static constexpr int kMaxShift = 120;
  static constexpr float kFloor = 0x1p-96f;  // a column with a smaller square counts as zero
  static constexpr float kEpsilon = 0x1p-23f;
  static constexpr float kSmallAngle = 0x1p-13f;  // its square is lost beside 1
};
template <>
struct Range<double> {
  static constexpr int kTop = 480;
  static constexpr int kMaxShift = 1000;
  static constexpr double kFloor = 0x1p-900;
  static constexpr double kEpsilon = 0x1p-52;
  static constexpr double kSmallAngle = 0x1p-27;
};

// The power of two that brings `peak` (finite, not negative) below 2^kTop.
template <typename T>
PKT_HOST_DEVICE T scale_of(T peak) {
  int exponent = 0;
  std::frexp(peak, &exponent);
  const int shift = Range<T>::kTop - exponent;
  return peak == T{0} ? T{1}
                      : std::ldexp(T{1}, shift < Range<T>::kMaxShift ? shift : Range<T>::kMaxShift);
}

// Columns whose angle is that close to a right one are orthogonal to working precision.
template <typename T>
PKT_HOST_DEVICE T tolerance_of(int64_t rows) {
  return Range<T>::kEpsilon * std::sqrt(static_cast<T>(rows + 8));
}

// Odd-even transposition: in each of `players` rounds the neighbours of every other seat meet and
// then change seats, so that all have met once and the first sits last. Pair `pair` < players / 2
// of round `round` < players: its two players, first < second, or false where a seat has no
// neighbour. (Players with even seats go up, those with odd seats down, and turn at the ends: steps
// on a circle of 2 * players phases.)
PKT_HOST_DEVICE bool meet(int round, int pair, int players, int& first, int& second) {
  const int seat = 2 * pair + round % 2;
  if (seat + 1 >= players) return false;
  const auto start_of = [players](int phase) {
    if (phase < 0) phase += 2 * players;
    return phase < players ? phase : 2 * players - 1 - phase;
  };
  const int one = start_of(seat - round);
  const int two = start_of(2 * players - 2 - seat - round);
  first = one < two ? one : two;
  second = one < two ? two : one;
  return true;
}

// What becomes of columns p and q: p - sine (q + half p) and q + sine (p - half q), in exchanged
// places if `swap`; half is the tangent of half the angle. (With the cosine written out, its
// rounding up to 1 would lengthen all columns, turn by turn.)
template <typename T>
struct Turn {
  T sine, half;
  bool swap;
};

// The turn that makes columns with squares `p2`, `q2` and inner product `dot` orthogonal, the
// longer one first; false where they are so already, or one is negligible.
template <typename T>
PKT_HOST_DEVICE bool turn_of(T p2, T q2, T dot, T tolerance, Turn<T>& turn) {
  if (p2 < Range<T>::kFloor || q2 < Range<T>::kFloor) return false;
  if (std::abs(dot) <= tolerance * std::sqrt(p2) * std::sqrt(q2)) return false;
  const T gap = q2 - p2;
  T tangent;
  if (std::abs(dot) < Range<T>::kSmallAngle * std::abs(gap)) {
    tangent = dot / gap;  // the general formula's limit, without its overflow
  } else {
    const T zeta = gap / (2 * dot);
    tangent = std::copysign(T{1}, zeta) / (std::abs(zeta) + std::sqrt(1 + zeta * zeta));
  }
  const T cosine = 1 / std::sqrt(1 + tangent * tangent);
  turn.sine = cosine * tangent;
  turn.half = turn.sine / (1 + cosine);
  turn.swap = p2 < q2;
  return true;
}

// One entry of each of the two columns.
template <typename T>
PKT_HOST_DEVICE void apply(const Turn<T>& turn, T& p, T& q) {
  const T new_p = p - turn.sine * (q + turn.half * p);
  const T new_q = q + turn.sine * (p - turn.half * q);
  p = turn.swap ? new_q : new_p;
  q = turn.swap ? new_p : new_q;
}

// The reflection I - tau v v^T, v[0] = 1, that takes a vector to (beta, 0, ...): v's other entries
// are the vector's times `rest`. tau = 0, the identity, where it is negligible.
template <typename T>
struct Reflection {
  T beta, tau, rest;
};

template <typename T>
PKT_HOST_DEVICE Reflection<T> reflection_of(T first, T square) {
  if (square < Range<T>::kFloor) return Reflection<T>{T{0}, T{0}, T{0}};
  const T beta = -std::copysign(std::sqrt(square), first);
  return Reflection<T>{beta, (beta - first) / beta, 1 / (first - beta)};
}

}  // namespace pkt::jacobi
