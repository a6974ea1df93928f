// SPDX-License-Identifier: Apache-2.0
// Row losses over logits and their gradients, in place, on the GPU.
//
// A block a row, which it goes through twice, a thread four neighbouring columns at a time, of
// every kThreads groups one: maxima and sums of both distributions, then loss and gradient. Rows
// that start at multiples of 16 bytes (targets: four elements) move by one load or store a group.
// Threads keep their own maximum and add groups in float64; they meet by shuffles and in the order
// of the warps: equal bits in every run.
//   1024 threads a row from 16384 columns on: one block fills a multiprocessor then, so that the
//   rows under way, 132 x 256 KB at 32000 columns, fit an L2 cache and the second pass reads them
//   there. Four blocks of 256 threads would keep four times as many rows under way. Below, rows are
//   short enough for that, and 256 threads have several groups each.
//   Bound: memory, 12 bytes an element as long as the second read is the L2's (to about 38000
//   columns on 132 multiprocessors), 20 beyond. Two special functions an element, pass and
//   distribution.
// Not done: a cluster of blocks a row beyond that, whose rows would fit again. No card has timed
// it.
#include <cmath>

#include "alignment/alignment.h"
#include "alignment/row_math.h"
#include "core/cuda/reduce.cuh"

namespace pkt {
namespace {

constexpr int kMany = 1024, kFew = 256;  // threads of a block
constexpr int64_t kWide = 16384;         // columns
constexpr float kPad = -1e37f;           // a logit that no distribution notices

struct Four {
  float values[4];
};

template <typename T>
struct __align__(4 * sizeof(T)) Quad {
  T values[4];
};

template <typename T>
__device__ __forceinline__ bool is_aligned(const T* row) {
  return reinterpret_cast<uintptr_t>(row) % sizeof(Quad<T>) == 0;
}

// Four columns from `at` on; `beyond` past the row's end.
template <typename T>
__device__ __forceinline__ Four load(const T* row, int64_t at, int64_t columns, bool wide,
                                     float beyond) {
  Four out;
  if (wide && at + 4 <= columns) {
    const Quad<T> quad = *reinterpret_cast<const Quad<T>*>(row + at);
#pragma unroll
    for (int i = 0; i < 4; ++i) out.values[i] = to_float(quad.values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) out.values[i] = at + i < columns ? to_float(row[at + i]) : beyond;
  }
  return out;
}

__device__ __forceinline__ void store(float* row, int64_t at, int64_t columns, bool wide,
                                      const Four& four) {
  if (wide && at + 4 <= columns) {
    *reinterpret_cast<Quad<float>*>(row + at) =
        Quad<float>{{four.values[0], four.values[1], four.values[2], four.values[3]}};
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (at + i < columns) row[at + i] = four.values[i];
    }
  }
}

// One row, as all threads of its block share it.
template <typename T, int kThreads>
struct Row {
  const AlignmentRowsParams& p;
  float* logits;
  const T* targets;
  bool wide, wide_targets;
  float pad;
  double finite = 0.0;  // NaN once this thread has seen a value that is not

  __device__ __forceinline__ explicit Row(const AlignmentRowsParams& params)
      : p(params),
        logits(p.logits + int64_t{blockIdx.x} * p.logit_stride),
        targets(static_cast<const T*>(p.targets) + int64_t{blockIdx.x} * p.target_stride),
        wide(is_aligned(logits)),
        wide_targets(is_aligned(targets)),
        pad(p.which == RowLoss::kCosineOneHot ? 0.0f : kPad) {}

  // body(column) for this thread's groups.
  template <typename Body>
  __device__ __forceinline__ void over_groups(const Body& body) const {
    for (int64_t at = int64_t{threadIdx.x} * 4; at < p.columns; at += int64_t{kThreads} * 4) {
      body(at);
    }
  }

  __device__ __forceinline__ void apply_cap(Four& four, int64_t at, float cap) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (at + i >= p.columns) continue;
      finite += four.values[i] * 0.0f;
      four.values[i] = cap * tanh_of(four.values[i] / cap);
    }
  }
  // The first pass leaves capped logits in their place.
  __device__ __forceinline__ Four first(int64_t at) {
    Four four = load(logits, at, p.columns, wide, pad);
    if (p.cap > 0.0f) {
      apply_cap(four, at, p.cap);
      store(logits, at, p.columns, wide, four);
    }
    return four;
  }
  __device__ __forceinline__ Four second(int64_t at) const {
    return load(logits, at, p.columns, wide, pad);
  }
  __device__ __forceinline__ Four target(int64_t at) {
    Four four = load(targets, at, p.columns, wide_targets, kPad);
    if (p.target_cap > 0.0f) apply_cap(four, at, p.target_cap);
    return four;
  }
  __device__ __forceinline__ void put(int64_t at, Four& gradient, const Four& capped) const {
#pragma unroll
    for (int i = 0; i < 4 && p.cap > 0.0f; ++i) {
      gradient.values[i] *= cap_slope(capped.values[i], p.cap);
    }
    store(logits, at, p.columns, wide, gradient);
  }

  // Adds exp((v - top) / tau) and, given `apart`, exp(..) apart.
  template <bool kWeighted>
  __device__ __forceinline__ static void add(Online& online, const Four& four, const Four& apart,
                                             float rate) {
    const float* v = four.values;
    const float left = v[0] > v[1] ? v[0] : v[1], right = v[2] > v[3] ? v[2] : v[3];
    online.raise(left > right ? left : right, rate);
    float sum = 0.0f, weighted = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float power = exp2_of((v[i] - online.top) * rate);
      sum += power;
      if constexpr (kWeighted) weighted += power * apart.values[i];
    }
    online.sum += sum;
    if constexpr (kWeighted) online.weighted += weighted;
  }

  // All threads' together, in every thread.
  template <bool kWeighted>
  __device__ __forceinline__ static void meet(Online& online, float rate, double* scratch) {
    online.raise(cuda::block_max<kThreads>(online.top, reinterpret_cast<float*>(scratch)), rate);
    online.sum = cuda::block_sum<kThreads>(online.sum, scratch);
    if constexpr (kWeighted) online.weighted = cuda::block_sum<kThreads>(online.weighted, scratch);
  }

  // The row's loss from the threads' parts; NaN, and so the gradient, unless all is finite.
  __device__ __forceinline__ void finish(double loss, double* scratch) const {
    const float total = static_cast<float>(cuda::block_sum<kThreads>(loss + finite, scratch));
    const bool sound = total - total == 0.0f;
    if (threadIdx.x == 0) p.loss[blockIdx.x] = sound ? total : nanf("");
    if (sound) return;
    for (int64_t at = threadIdx.x; at < p.columns; at += kThreads) logits[at] = nanf("");
  }
};

template <typename T, int kThreads>
__device__ __forceinline__ void kl_row(Row<T, kThreads>& row, double* scratch) {
  const AlignmentRowsParams& p = row.p;
  const float rate = kLog2e / p.temperature;
  Online student, teacher;
  row.over_groups([&](int64_t at) {
    const Four logits = row.first(at), targets = row.target(at);
    row.template add<false>(student, logits, logits, rate);
    row.template add<false>(teacher, targets, targets, rate);
  });
  row.template meet<false>(student, rate, scratch);
  row.template meet<false>(teacher, rate, scratch);
  const Softmax q = student.softmax(rate), t = teacher.softmax(rate);
  const float inverse = 1.0f / p.temperature;
  const float log_shares = static_cast<float>(log(student.sum / teacher.sum));
  double loss = 0.0;
  row.over_groups([&](int64_t at) {
    const Four logits = row.second(at), targets = row.target(at);
    Four gradient;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Divergence<float> d =
          divergence(logits.values[i], targets.values[i], q, t, inverse, log_shares);
      sum += d.loss;
      gradient.values[i] = p.temperature * d.slope;
    }
    loss += sum;
    row.put(at, gradient, logits);
  });
  row.finish(loss * p.temperature * p.temperature, scratch);
}

template <typename T, int kThreads>
__device__ __forceinline__ void fisher_row(Row<T, kThreads>& row, double* scratch) {
  const float rate = kLog2e / row.p.temperature;
  Online online;
  row.over_groups([&](int64_t at) {
    const Four logits = row.first(at), targets = row.target(at);
    Four apart;
#pragma unroll
    for (int i = 0; i < 4; ++i) apart.values[i] = logits.values[i] - targets.values[i];
    row.template add<true>(online, targets, apart, rate);
  });
  row.template meet<true>(online, rate, scratch);
  const Softmax t = online.softmax(rate);
  const float mean = static_cast<float>(online.weighted / online.sum);
  double loss = 0.0;
  row.over_groups([&](int64_t at) {
    const Four logits = row.second(at), targets = row.target(at);
    Four gradient;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float apart = (logits.values[i] - targets.values[i]) - mean;
      gradient.values[i] = exp2_of((targets.values[i] - t.top) * t.rate) * t.share * apart;
      sum += gradient.values[i] * apart;
    }
    loss += sum;
    row.put(at, gradient, logits);
  });
  row.finish(0.5 * loss, scratch);
}

// The label of the row; one that is no column spoils the row.
template <int kThreads>
__device__ __forceinline__ int64_t label_of(Row<float, kThreads>& row) {
  const int64_t label = row.p.labels[blockIdx.x];
  if (label >= 0 && label < row.p.columns) return label;
  row.finite = nanf("");
  return 0;
}

template <int kThreads>
__device__ __forceinline__ void cross_entropy_row(Row<float, kThreads>& row, double* scratch) {
  const int64_t label = label_of(row);
  Online others;
  row.over_groups([&](int64_t at) {
    Four logits = row.first(at);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      row.finite += logits.values[i] * 0.0f;
      if (at + i == label) logits.values[i] = kPad;
    }
    row.template add<false>(others, logits, logits, kLog2e);
  });
  row.template meet<false>(others, kLog2e, scratch);
  const float chosen = row.logits[label];
  const Choice choice = choose(chosen, others);
  __syncthreads();  // all have read the label's logit
  row.over_groups([&](int64_t at) {
    const Four logits = row.second(at);
    Four gradient;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      gradient.values[i] =
          at + i == label
              ? -choice.missing
              : exp2_of((logits.values[i] - choice.all.top) * choice.all.rate) * choice.all.share;
    }
    row.put(at, gradient, logits);
  });
  row.finish(threadIdx.x == 0 ? choice.loss : 0.0, scratch);
}

template <int kThreads>
__device__ __forceinline__ void cosine_one_hot_row(Row<float, kThreads>& row, double* scratch) {
  const int64_t label = label_of(row);
  double square = 0.0;
  row.over_groups([&](int64_t at) {
    const Four logits = row.first(at);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += logits.values[i] * logits.values[i];
    square += sum;
  });
  square = cuda::block_sum<kThreads>(square, scratch);
  const OneHotCosine found = one_hot_cosine(row.logits[label], square);
  __syncthreads();  // all have read the label's logit
  row.over_groups([&](int64_t at) {
    const Four logits = row.second(at);
    Four gradient;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      gradient.values[i] = at + i == label ? found.at_label : found.factor * logits.values[i];
    }
    row.put(at, gradient, logits);
  });
  row.finish(threadIdx.x == 0 ? found.loss : 0.0, scratch);
}

template <RowLoss kWhich, typename T, int kThreads>
__global__ void __launch_bounds__(kThreads) align_row(AlignmentRowsParams p) {
  Row<T, kThreads> row(p);
  double* const scratch = cuda::shared_memory<double>();
  if constexpr (kWhich == RowLoss::kKl) kl_row(row, scratch);
  if constexpr (kWhich == RowLoss::kFisher) fisher_row(row, scratch);
  if constexpr (kWhich == RowLoss::kCrossEntropy) cross_entropy_row(row, scratch);
  if constexpr (kWhich == RowLoss::kCosineOneHot) cosine_one_hot_row(row, scratch);
}

template <RowLoss kWhich, typename T>
void launch_rows(const AlignmentRowsParams& p, void* stream) {
  const auto run = [&](auto kernel, int threads) {
    cuda::launch(kernel, dim3(static_cast<unsigned>(p.rows)), dim3(threads),
                 threads / 32 * sizeof(double), static_cast<cudaStream_t>(stream), p);
  };
  p.columns >= kWide ? run(align_row<kWhich, T, kMany>, kMany)
                     : run(align_row<kWhich, T, kFew>, kFew);
}

}  // namespace

void alignment_rows_cuda(const AlignmentRowsParams& p, void* stream) {
  if (p.rows >= int64_t{1} << 31) {
    throw std::invalid_argument("logits: 2^31 rows and more exceed a grid");
  }
  if (p.which == RowLoss::kCrossEntropy) {
    return launch_rows<RowLoss::kCrossEntropy, float>(p, stream);
  }
  if (p.which == RowLoss::kCosineOneHot) {
    return launch_rows<RowLoss::kCosineOneHot, float>(p, stream);
  }
  with_float_type(p.target_dtype, [&](auto type) {
    using T = decltype(type);
    p.which == RowLoss::kKl ? launch_rows<RowLoss::kKl, T>(p, stream)
                            : launch_rows<RowLoss::kFisher, T>(p, stream);
  });
}

}  // namespace pkt
