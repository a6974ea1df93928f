// SPDX-License-Identifier: Apache-2.0
// Sweep and settle (max_window.h) on the GPU, in three launches:
//   sweep    a block a tile of places and a chunk of rows. A thread owns kOwn neighbouring columns
//            where windows begin and those `width` further, where they end, so that it holds the
//            changes from place to place; the columns between are dealt out and only summed. In the
//            fringe every pair of rows costs a scan over the block (one barrier) and a comparison;
//            in the core the whole chunk costs one scan.
//   settle   a block 32 places, each of its warps a run of the chunks: starts, then candidates.
//   pick     a block a matrix: the best of the blocks' bests.
// Bound: one read of the scores from memory. For 13824 x 5120 float32 and windows of 11008 x 4096
// that is 283 MB; the chunks' vectors, 9.7 MB (1025 places x (533 chunks + 3 x 217 with pairs)),
// are written and read once and fit an L2 cache. Where rows, windows and the matrix begin and end
// at multiples of 16 bytes every load is one of 16 bytes, with up to 48 KB of them under way in
// a block of 256, two such blocks a multiprocessor. Where float64 has 1/64 of float32's rate the
// 2.5 conversions and additions an element take about as long as the read.
// Rows with more than kPlaces + 1 places (4096; float64 2048; unaligned 1024) are cut into tiles,
// each of which sums its own first window: columns they share are read again, mostly from L2.
// Dropped: storing the fringe rows' sums to slide down them later (46 MB for that matrix, written
// and read); a scan for each row of the core; one kernel for aligned and unaligned rows (spills).
#include <cmath>
#include <stdexcept>

#include "core/cuda/launch.cuh"
#include "core/cuda/reduce.cuh"
#include "max_window/max_window.h"

namespace pkt {
namespace {

using cuda::ceil_div;

constexpr int64_t kChunks = 512;  // wanted: some four blocks a multiprocessor
constexpr int kSettleWarps = 16;
constexpr int kSettleThreads = 32 * kSettleWarps;
constexpr int kPickThreads = 256;

constexpr double kLowest = -1.7976931348623157e308;  // what an idle thread puts forward

struct Candidate {
  double total;
  int64_t rank;
};

// Non-finite first, then larger totals, then earlier places.
__device__ __forceinline__ bool beats(const Candidate& a, const Candidate& b) {
  const bool a_bad = !(a.total - a.total == 0.0);
  const bool b_bad = !(b.total - b.total == 0.0);
  if (a_bad || b_bad) return a_bad && !b_bad;
  return a.total > b.total || (a.total == b.total && a.rank < b.rank);
}

// Leaves the block's best candidate in thread 0.
template <int kThreads>
__device__ __forceinline__ Candidate block_best(const Candidate& mine, Candidate* scratch) {
  scratch[threadIdx.x] = mine;
  __syncthreads();
  for (unsigned half_size = kThreads / 2; half_size > 0; half_size /= 2) {
    if (threadIdx.x < half_size) {
      const Candidate other = scratch[threadIdx.x + half_size];
      if (beats(other, scratch[threadIdx.x])) scratch[threadIdx.x] = other;
    }
    __syncthreads();
  }
  return scratch[0];
}

// What the batch leaves in the workspace: vectors over the places for every matrix and chunk.
struct Slots {
  int64_t places;
  double* left;      // [batch, chunks]: sums of the leaving rows, or of the core's
  double* moved;     // [batch, moves]: how far each chunk's pairs take the window
  double* best;      // [batch, moves]: the furthest it gets on the way, and at which row
  int64_t* at;       // [batch, moves]
  Candidate* bests;  // [batch, settle's blocks], two values each

  static int64_t blocks(const MaxWindowPlan& plan) { return ceil_div(plan.places, 32); }
  static int64_t count(const MaxWindowPlan& plan) {
    return (plan.chunks + 3 * plan.moves) * plan.places + 2 * blocks(plan);
  }
  Slots(const MaxWindowPlan& plan, const MaxWindowParams& p)
      : places(plan.places),
        left(p.workspace),
        moved(left + p.batch * plan.chunks * places),
        best(moved + p.batch * plan.moves * places),
        at(reinterpret_cast<int64_t*>(best + p.batch * plan.moves * places)),
        bests(reinterpret_cast<Candidate*>(best + 2 * p.batch * plan.moves * places)) {}
};
static_assert(sizeof(Candidate) == 2 * sizeof(double), "the workspace counts in float64 values");

// Neighbouring elements, moved by one load.
template <typename T, int kSize>
struct __align__(kSize * sizeof(T)) Vector {
  T values[kSize];
};

// The part of a row that a block works on, seen by one thread.
template <typename T, int kThreads, int kOwn, bool kWide>
struct Tile {
  static constexpr int kVector = kWide ? 16 / sizeof(T) : 1;
  static constexpr int kVectors = kOwn / kVector;
  static constexpr int kBatch = kThreads > 256 ? 1 : kOwn > 4 ? 2 : 4;  // as registers allow
  static constexpr int64_t kPlaces = int64_t{kThreads} * kOwn;
  using Values = Vector<T, kVector>;

  int64_t begin;          // column of the tile's first window
  int64_t own;            // this thread's columns, counted from `begin`, are own .. own + kOwn - 1
  int64_t changes;        // windows after the first
  int64_t middle;         // where the columns begin that stay in every window
  int64_t width, inside;  // of a window; columns up to the row's end
  int64_t stride;

  // `score` is the first row's element at the tile's first column.
  __device__ __forceinline__ Tile(const T* score, const MaxWindowParams& p, int64_t index)
      : begin(index * kPlaces),
        own(int64_t{threadIdx.x} * kOwn),
        changes(p.cols - p.width - begin < kPlaces ? p.cols - p.width - begin : kPlaces),
        middle(ceil_div(changes, kOwn) * kOwn),
        width(p.width),
        inside(p.cols - begin),
        stride(p.col_stride) {}

  // Zeros from `end` on, which cuts no vector.
  __device__ __forceinline__ Values load(const T* row, int64_t col, int64_t end) const {
    if (col >= end) return Values{};
    return *reinterpret_cast<const Values*>(row + (kWide ? col : col * stride));
  }

  // Calls use(r, 0, x) with this thread's part x of the sum of rows[r] over the tile's first
  // window, and use(r, 1 + i, x) with the change that follows at its column i. All loads but those
  // of later batches are issued before any is used.
  template <int kRows, typename Use>
  __device__ __forceinline__ void read(const T* const (&rows)[kRows], const Use& use) const {
    constexpr int64_t kStep = int64_t{kThreads} * kVector;
    Values lost[kRows][kVectors], gained[kRows][kVectors], stays[kRows][kBatch];
    double first[kRows] = {};
    const bool fringe = own < middle;
    int64_t col = middle + int64_t{threadIdx.x} * kVector;
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        const int64_t begins = own + v * kVector;
        lost[r][v] = load(rows[r], begins, fringe ? inside : 0);
        gained[r][v] = load(rows[r] + width * stride, begins, fringe ? inside - width : 0);
      }
    }
    const auto load_batch = [&] {
      for (int r = 0; r < kRows; ++r) {
        for (int b = 0; b < kBatch; ++b) {
          stays[r][b] = load(rows[r], col + b * kStep, width);
        }
      }
    };
    load_batch();
    if (fringe) {
      for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kVectors; ++v) {
          const bool in_first = own + v * kVector < width;
          for (int i = 0; i < kVector; ++i) {
            const double out = to_double(lost[r][v].values[i]);
            use(r, 1 + v * kVector + i, to_double(gained[r][v].values[i]) - out);
            if (in_first) first[r] += out;
          }
        }
      }
    }
#pragma unroll 1
    while (col < width) {
      for (int b = 0; b < kBatch && col + b * kStep < width; ++b) {
        for (int r = 0; r < kRows; ++r) {
          for (int i = 0; i < kVector; ++i) first[r] += to_double(stays[r][b].values[i]);
        }
      }
      col += kBatch * kStep;
      if (col < width) load_batch();
    }
    for (int r = 0; r < kRows; ++r) use(r, 0, first[r]);
  }

  // From what read() gives to windows[0], the sum of the tile's first window, and windows[1 + i],
  // of the one that begins after own column i.
  __device__ __forceinline__ void scan(double (&windows)[kOwn + 1], double* scratch) const {
    double before = 0.0;
    for (int i = 1; i <= kOwn; ++i) before += windows[i];
    cuda::block_prefix_and_total<kThreads>(before, windows[0], scratch);
    windows[1] += windows[0] + before;
    for (int i = 2; i <= kOwn; ++i) windows[i] += windows[i - 1];
  }

  // Writes value(i) of window i of this thread's; a tile's first belongs to the tile before.
  template <typename Out, typename Value>
  __device__ __forceinline__ void store(Out* slot, const Value& value) const {
    if (begin == 0 && threadIdx.x == 0) slot[0] = value(0);
    for (int i = 1; i <= kOwn; ++i) {
      if (own + i <= changes) slot[begin + own + i] = value(i);
    }
  }
};

template <typename T, int kThreads, int kOwn, bool kWide>
__global__ void __launch_bounds__(kThreads, 512 / kThreads)
    sweep(const T* score, MaxWindowParams p, MaxWindowPlan plan, Slots slots) {
  const int64_t chunk = blockIdx.y, matrix = blockIdx.z;
  const int64_t top = plan.first(chunk), end = plan.first(chunk + 1);
  score +=
      matrix * p.batch_stride + blockIdx.x * Tile<T, kThreads, kOwn, kWide>::kPlaces * p.col_stride;
  const Tile<T, kThreads, kOwn, kWide> tile(score, p, blockIdx.x);
  // Shared memory: scratch for two scans in turn, then this thread's own.
  double* scratch = cuda::shared_memory<double>();
  double* other_scratch = scratch + kThreads / 16;
  double* left = scratch + kThreads / 8 + threadIdx.x;
  double* best = left + (kOwn + 1) * kThreads;
  int* at = reinterpret_cast<int*>(best - threadIdx.x + (kOwn + 1) * kThreads) + threadIdx.x;
  for (int i = 0; i <= kOwn; ++i) left[i * kThreads] = 0.0;
  double windows[kOwn + 1] = {};
  if (chunk < plan.moves) {
    double moved[kOwn + 1] = {};
    for (int64_t k = top; k < end; ++k) {
      const T* const pair[] = {score + k * p.row_stride, score + (p.height + k) * p.row_stride};
      tile.read(pair, [&](int r, int i, double value) {
        if (r == 0) left[i * kThreads] += value;
        moved[i] += r == 0 ? -value : value;
      });
      for (int i = 0; i <= kOwn; ++i) windows[i] = moved[i];
      tile.scan(windows, scratch);
      double* const used = scratch;  // the next scan's, one barrier on, is the other
      scratch = other_scratch;
      other_scratch = used;
      for (int i = 0; i <= kOwn; ++i) {
        if (k == top || windows[i] > best[i * kThreads]) {
          best[i * kThreads] = windows[i];
          at[i * kThreads] = static_cast<int>(k - top);
        }
      }
    }
    const int64_t slot = (matrix * plan.moves + chunk) * slots.places;
    tile.store(slots.moved + slot, [&](int i) { return windows[i]; });
    tile.store(slots.best + slot, [&](int i) { return best[i * kThreads]; });
    tile.store(slots.at + slot, [&](int i) { return top + 1 + at[i * kThreads]; });
  } else {
    const auto add = [&](int, int i, double value) { left[i * kThreads] += value; };
    int64_t r = top;
    for (; r + 1 < end; r += 2) {
      const T* const two[] = {score + r * p.row_stride, score + (r + 1) * p.row_stride};
      tile.read(two, add);
    }
    if (r < end) {
      const T* const one[] = {score + r * p.row_stride};
      tile.read(one, add);
    }
  }
  for (int i = 0; i <= kOwn; ++i) windows[i] = left[i * kThreads];
  tile.scan(windows, scratch);
  tile.store(slots.left + (matrix * plan.chunks + chunk) * slots.places,
             [&](int i) { return windows[i]; });
}

// A warp takes a run of the chunks, a lane a place.
__global__ void __launch_bounds__(kSettleThreads, 1)
    settle(MaxWindowParams p, MaxWindowPlan plan, Slots slots) {
  double* starts = cuda::shared_memory<double>();
  double* moves = starts + kSettleThreads;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t matrix = blockIdx.y, place = int64_t{blockIdx.x} * 32 + lane;
  const bool inside = place < slots.places;
  const double* left = slots.left + matrix * plan.chunks * slots.places + place;
  const int64_t first = matrix * plan.moves * slots.places + place;
  const int64_t begin = plan.moves * warp / kSettleWarps;
  const int64_t end = inside ? plan.moves * (warp + 1) / kSettleWarps : begin;

  double start = 0.0, move = 0.0;
  if (inside) {
#pragma unroll 8
    for (int64_t c = plan.starts * warp / kSettleWarps; c < plan.starts * (warp + 1) / kSettleWarps;
         ++c) {
      start += left[c * slots.places];
    }
  }
#pragma unroll 8
  for (int64_t c = begin; c < end; ++c) move += slots.moved[first + c * slots.places];
  starts[threadIdx.x] = start;
  moves[threadIdx.x] = move;
  __syncthreads();
  double here = 0.0;
  for (int w = 0; w < kSettleWarps; ++w) here += starts[w * 32 + lane];
  for (int w = 0; w < warp; ++w) here += moves[w * 32 + lane];
  __syncthreads();

  Candidate best{kLowest, p.rows * p.cols};
  if (inside && warp == 0) best = Candidate{here, p.rank(0, place)};
#pragma unroll 4
  for (int64_t c = begin; c < end; ++c) {
    const int64_t slot = first + c * slots.places;
    const Candidate found{here + slots.best[slot], p.rank(slots.at[slot], place)};
    if (beats(found, best)) best = found;
    here += slots.moved[slot];
  }
  // An infinity or a NaN that was ever added stays in the sums.
  if (inside && !(here - here == 0.0)) best.total = here;
  best = block_best<kSettleThreads>(best, cuda::shared_memory<Candidate>());
  if (threadIdx.x == 0) slots.bests[matrix * gridDim.x + blockIdx.x] = best;
}

__global__ void __launch_bounds__(kPickThreads)
    pick(MaxWindowParams p, const Candidate* bests, int64_t count) {
  Candidate best{kLowest, p.rows * p.cols};
  for (int64_t i = threadIdx.x; i < count; i += kPickThreads) {
    const Candidate here = bests[blockIdx.x * count + i];
    if (beats(here, best)) best = here;
  }
  best = block_best<kPickThreads>(best, cuda::shared_memory<Candidate>());
  if (threadIdx.x == 0) {
    p.report(blockIdx.x, best.rank, best.total, best.total - best.total == 0.0);
  }
}

// Bytes of a sweep's shared memory: scratch for two scans, then what the threads own.
constexpr int64_t sweep_shared(int threads, int own) {
  return threads / 8 * sizeof(double) + threads * (own + 1) * (2 * sizeof(double) + sizeof(int));
}

template <typename T, int kThreads, int kOwn, bool kWide>
void launch_sweep(const MaxWindowParams& p, const MaxWindowPlan& plan, const Slots& slots,
                  cudaStream_t stream) {
  const int64_t changes = std::max<int64_t>(plan.places - 1, 1);
  const dim3 grid(static_cast<unsigned>(ceil_div(changes, Tile<T, kThreads, kOwn, kWide>::kPlaces)),
                  static_cast<unsigned>(plan.chunks), static_cast<unsigned>(p.batch));
  cuda::launch(sweep<T, kThreads, kOwn, kWide>, grid, dim3(kThreads), sweep_shared(kThreads, kOwn),
               stream, static_cast<const T*>(p.score), p, plan, slots);
}

// Whether rows, windows and matrices begin and end at multiples of 16 bytes.
template <typename T>
bool is_wide(const MaxWindowParams& p) {
  constexpr int64_t kVector = 16 / sizeof(T);
  return p.col_stride == 1 && reinterpret_cast<uintptr_t>(p.score) % 16 == 0 &&
         (p.row_stride | p.batch_stride | p.cols | p.width) % kVector == 0;
}

template <typename T>
void search(const MaxWindowParams& p, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T), kMost = kVector == 2 ? 4 : 8;
  const MaxWindowPlan plan(p, kChunks);
  const Slots slots(plan, p);
  if (!is_wide<T>(p)) {
    launch_sweep<T, 256, 4, false>(p, plan, slots, stream);
  } else if (plan.places - 1 <= Tile<T, 256, kVector, true>::kPlaces ||
             sweep_shared(512, kMost) > cuda::shared_memory_limit()) {
    launch_sweep<T, 256, kVector, true>(p, plan, slots, stream);
  } else {
    launch_sweep<T, 512, kMost, true>(p, plan, slots, stream);
  }
  const auto batch = static_cast<unsigned>(p.batch);
  const int64_t blocks = Slots::blocks(plan);
  cuda::launch(settle, dim3(static_cast<unsigned>(blocks), batch), dim3(kSettleThreads),
               kSettleThreads * sizeof(Candidate), stream, p, plan, slots);
  cuda::launch(pick, dim3(batch), dim3(kPickThreads), kPickThreads * sizeof(Candidate), stream, p,
               slots.bests, blocks);
}

}  // namespace

int64_t max_window_workspace_cuda(const MaxWindowParams& p) {
  return p.batch * Slots::count(MaxWindowPlan(p, kChunks));
}

void max_window_cuda(const MaxWindowParams& p, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case DType::f32:
      return search<float>(p, on);
    case DType::f64:
      return search<double>(p, on);
    case DType::f16:
      return search<half>(p, on);
    case DType::bf16:
      return search<bfloat16>(p, on);
    default:
      throw std::logic_error("max_window: dtype the binding does not admit");
  }
}

}  // namespace pkt
