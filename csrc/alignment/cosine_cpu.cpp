// SPDX-License-Identifier: Apache-2.0
// The cosine of hidden states to their targets, row by row, and its gradient, on the CPU.
//
// A task is a few rows. Products of float32 values are exact in float64, where eight lanes add them
// in an order that depends on the width alone: equal bits on any thread count, and a row that
// equals its target, or a multiple of it by a power of two, has loss 0. Bound: memory, both
// operands read once a pass.
#include <algorithm>
#include <cmath>

#include "alignment/alignment.h"
#include "core/parallel.h"

namespace pkt {
namespace {

constexpr int64_t kLanes = 8;
constexpr int64_t kRowsPerTask = 8;
constexpr int64_t kAlone = 1 << 15;  // elements below which waking threads costs more

struct Sums {
  double dot = 0.0, state = 0.0, target = 0.0;  // s.t, |s|^2, |t|^2
};

template <typename S, typename T>
PKT_SIMD_CLONES void add_products(const S* states, const T* targets, int64_t count, Sums& sums) {
  double dot[kLanes] = {}, state[kLanes] = {}, target[kLanes] = {};
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t j = 0; j < whole; j += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const double s = to_float(states[j + lane]), t = to_float(targets[j + lane]);
      dot[lane] += s * t;
      state[lane] += s * s;
      target[lane] += t * t;
    }
  }
  for (int64_t j = whole; j < count; ++j) {
    const double s = to_float(states[j]), t = to_float(targets[j]);
    dot[j - whole] += s * t;
    state[j - whole] += s * s;
    target[j - whole] += t * t;
  }
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    sums.dot += dot[lane];
    sums.state += state[lane];
    sums.target += target[lane];
  }
}

template <typename S, typename T>
PKT_SIMD_CLONES void combine(const S* states, const T* targets, int64_t count, float by_target,
                             float by_state, S* out) {
  for (int64_t j = 0; j < count; ++j) {
    from_float(by_target * to_float(targets[j]) + by_state * to_float(states[j]), out[j]);
  }
}

template <typename Body>
void over_rows(const CosineRowsParams& p, int threads, const Body& body) {
  const int used = p.rows * p.columns < kAlone ? 1 : threads;
  parallel_for(used, ceil_div(p.rows, kRowsPerTask), [&](int64_t task) {
    const int64_t end = std::min(p.rows, (task + 1) * kRowsPerTask);
    for (int64_t row = task * kRowsPerTask; row < end; ++row) body(row);
  });
}

}  // namespace

void cosine_rows_cpu(const CosineRowsParams& p, int threads) {
  with_float_type(p.state_dtype, [&](auto state) {
    with_float_type(p.target_dtype, [&](auto target) {
      using S = decltype(state);
      using T = decltype(target);
      over_rows(p, threads, [&](int64_t row) {
        Sums sums;
        add_products(static_cast<const S*>(p.states) + row * p.state_stride,
                     static_cast<const T*>(p.targets) + row * p.target_stride, p.columns, sums);
        const Cosine found = cosine_of(sums.dot, sums.state, sums.target);
        p.loss[row] = found.loss;
        p.factors[2 * row] = found.by_target;
        p.factors[2 * row + 1] = found.by_state;
      });
    });
  });
}

void cosine_rows_backward_cpu(const CosineRowsBackwardParams& q, int threads) {
  const CosineRowsParams& p = q.forward;
  with_float_type(p.state_dtype, [&](auto state) {
    with_float_type(p.target_dtype, [&](auto target) {
      using S = decltype(state);
      using T = decltype(target);
      over_rows(p, threads, [&](int64_t row) {
        const float upstream = q.loss_gradient[row];
        combine(static_cast<const S*>(p.states) + row * p.state_stride,
                static_cast<const T*>(p.targets) + row * p.target_stride, p.columns,
                upstream * p.factors[2 * row], upstream * p.factors[2 * row + 1],
                static_cast<S*>(q.gradient) + row * p.columns);
      });
    });
  });
}

}  // namespace pkt
