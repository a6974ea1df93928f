// SPDX-License-Identifier: Apache-2.0
// Sweep and settle (max_window.h) on the CPU: a chunk a task and one parallel region a call, with
// nothing to wait for in between, so that a busy machine delays a task and not every band.
// Bound: one read of the matrix from memory. The sums along rows and the changes from place to
// place are vectors; only the scan over the places is a chain of additions, three cycles a place.
// Dropped: running column sums for each position, then a scan along each (twice the additions over
// whole rows, and two regions for every 128 positions: 46 barriers for a feed-forward matrix).
#include <cmath>
#include <stdexcept>

#include "core/parallel.h"
#include "max_window/max_window.h"

namespace pkt {
namespace {

constexpr int64_t kChunks = 256;      // wanted: enough to share out, few enough for settle
constexpr int64_t kSerial = 1 << 20;  // elements below which waking other threads costs more
constexpr int64_t kLanes = 32;        // partial sums of a row

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Sum in a fixed order of interleaved partial sums.
template <typename T>
PKT_SIMD_CLONES double sum(const T* row, int64_t stride, int64_t count) {
  double lanes[kLanes] = {};
  int64_t j = 0;
  if (stride == 1) {
    for (; j + kLanes <= count; j += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += to_double(row[j + lane]);
    }
  }
  for (; j < count; ++j) lanes[j % kLanes] += to_double(row[j * stride]);
  for (int64_t half_size = kLanes / 2; half_size > 0; half_size /= 2) {
    for (int64_t lane = 0; lane < half_size; ++lane) lanes[lane] += lanes[lane + half_size];
  }
  return lanes[0];
}

// changes[j] += gained[j] - lost[j]
template <typename T>
PKT_SIMD_CLONES void add_changes(double* changes, const T* gained, const T* lost, int64_t stride,
                                 int64_t count) {
  if (stride == 1) {
    for (int64_t j = 0; j < count; ++j) changes[j] += to_double(gained[j]) - to_double(lost[j]);
  } else {
    for (int64_t j = 0; j < count; ++j) {
      changes[j] += to_double(gained[j * stride]) - to_double(lost[j * stride]);
    }
  }
}

// The sums of a row over its windows: the first of them, then each one's change from the one
// before.
template <typename T>
void add_row(double* windows, const T* row, const MaxWindowParams& p) {
  windows[0] += sum(row, p.col_stride, p.width);
  add_changes(windows + 1, row + p.width * p.col_stride, row, p.col_stride, p.cols - p.width);
}

// Changes to sums.
void scan(double* windows, int64_t places) {
  for (int64_t j = 1; j < places; ++j) windows[j] += windows[j - 1];
}

// After `step` moves down the window at place j has gained entered - left, up to j.
void compare(const double* entered, const double* left, int64_t step, double* best, int64_t* at,
             int64_t places) {
  double gone = 0.0;
  for (int64_t j = 0; j < places; ++j) {
    gone += entered[j] - left[j];
    at[j] = gone > best[j] ? step : at[j];
    best[j] = gone > best[j] ? gone : best[j];
  }
}

PKT_SIMD_CLONES void add(double* sums, const double* values, int64_t count) {
  for (int64_t j = 0; j < count; ++j) sums[j] += values[j];
}

// What a matrix leaves in the workspace: vectors over the places.
struct Slots {
  double* left;   // [chunks]: sums of the leaving rows, or of the core's
  double* moved;  // [moves]: how far each chunk's pairs take the window
  double* best;   // [moves]: the furthest it gets on the way, and at which row
  int64_t* at;
  double* found;  // [1] each, of all chunks
  int64_t* found_at;

  static int64_t count(const MaxWindowPlan& plan) {
    return (plan.chunks + 3 * plan.moves + 2) * plan.places;
  }
  Slots(const MaxWindowPlan& plan, double* workspace)
      : left(workspace),
        moved(left + plan.chunks * plan.places),
        best(moved + plan.moves * plan.places),
        at(reinterpret_cast<int64_t*>(best + plan.moves * plan.places)),
        found(best + 2 * plan.moves * plan.places),
        found_at(reinterpret_cast<int64_t*>(found + plan.places)) {}
};

template <typename T>
void sweep(const T* score, const MaxWindowParams& p, const MaxWindowPlan& plan, const Slots& slots,
           int64_t chunk) {
  const int64_t places = plan.places;
  double* left = slots.left + chunk * places;
  std::fill_n(left, places, 0.0);
  if (chunk >= plan.moves) {
    for (int64_t k = plan.first(chunk); k < plan.first(chunk + 1); ++k) {
      add_row(left, score + k * p.row_stride, p);
    }
  } else {
    double* entered = slots.moved + chunk * places;
    double* best = slots.best + chunk * places;
    int64_t* at = slots.at + chunk * places;
    std::fill_n(entered, places, 0.0);
    std::fill_n(best, places, -kInfinity);
    std::fill_n(at, places, 0);
    for (int64_t k = plan.first(chunk); k < plan.first(chunk + 1); ++k) {
      add_row(left, score + k * p.row_stride, p);
      add_row(entered, score + (p.height + k) * p.row_stride, p);
      compare(entered, left, k + 1, best, at, places);
    }
    for (int64_t j = 0; j < places; ++j) entered[j] -= left[j];
    scan(entered, places);
  }
  scan(left, places);
}

PKT_SIMD_CLONES void settle(const MaxWindowParams& p, const MaxWindowPlan& plan, const Slots& s,
                            int64_t matrix) {
  const int64_t places = plan.places;
  double* total = s.left;
  for (int64_t chunk = 1; chunk < plan.starts; ++chunk) add(total, s.left + chunk * places, places);
  std::copy_n(total, places, s.found);
  std::fill_n(s.found_at, places, 0);
  for (int64_t chunk = 0; chunk < plan.moves; ++chunk) {
    const double* best = s.best + chunk * places;
    const int64_t* at = s.at + chunk * places;
    const double* moved = s.moved + chunk * places;
    for (int64_t j = 0; j < places; ++j) {
      const double here = total[j] + best[j];
      s.found_at[j] = here > s.found[j] ? at[j] : s.found_at[j];
      s.found[j] = here > s.found[j] ? here : s.found[j];
      total[j] += moved[j];
    }
  }
  // An infinity or a NaN that was ever added stays in the sums: it shows in the last window's.
  bool finite = true;
  double most = -kInfinity;
  int64_t first = 0;
  for (int64_t j = 0; j < places; ++j) {
    const int64_t rank = p.rank(s.found_at[j], j);
    finite = finite && std::isfinite(total[j]);
    if (s.found[j] > most || (s.found[j] == most && rank < first)) {
      most = s.found[j];
      first = rank;
    }
  }
  p.report(matrix, first, most, finite);
}

template <typename T>
void search(const MaxWindowParams& p, int threads) {
  const MaxWindowPlan plan(p, kChunks);
  if (p.batch * p.rows * p.cols < kSerial) threads = 1;
  const auto slots = [&](int64_t matrix) {
    return Slots(plan, p.workspace + matrix * Slots::count(plan));
  };
  parallel_for(threads, p.batch * plan.chunks, [&](int64_t task) {
    const int64_t matrix = task / plan.chunks;
    sweep(static_cast<const T*>(p.score) + matrix * p.batch_stride, p, plan, slots(matrix),
          task % plan.chunks);
  });
  parallel_for(threads, p.batch, [&](int64_t i) { settle(p, plan, slots(i), i); });
}

}  // namespace

int64_t max_window_workspace_cpu(const MaxWindowParams& p) {
  return p.batch * Slots::count(MaxWindowPlan(p, kChunks));
}

void max_window_cpu(const MaxWindowParams& params, int threads) {
  switch (params.dtype) {
    case DType::f32:
      return search<float>(params, threads);
    case DType::f64:
      return search<double>(params, threads);
    case DType::f16:
      return search<half>(params, threads);
    case DType::bf16:
      return search<bfloat16>(params, threads);
    default:
      throw std::logic_error("max_window: dtype the binding does not admit");
  }
}

}  // namespace pkt
