// SPDX-License-Identifier: Apache-2.0
// Row losses over logits and their gradients, in place, on the CPU.
//
// A task is a row. It goes through twice by blocks of 512 columns: online maxima and sums of both
// distributions, then loss and gradient; at 32000 columns the second pass finds the row in the L2.
// A block has its maximum first, so that an element costs one exponential a distribution and pass;
// targets that are 16-bit or soft-capped are brought to float32 a block at a time, student logits
// are soft-capped where they lie. Within a block 16 float32 lanes, blocks in float64, all in an
// order that depends on shapes alone: equal bits on any thread count. Products are fused with
// additions where the machine can (CMakeLists.txt), a quarter of the time.
// Bound: about 90 float32 operations an element, four exponentials among them, 0.8 ns on one
// AVX-512 core measured; beside them 12 bytes, one logit and one target read, one gradient written.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>

#include "alignment/alignment.h"
#include "alignment/row_math.h"
#include "core/parallel.h"

namespace pkt {
namespace {

constexpr int64_t kBlock = 512;
constexpr int64_t kLanes = 16;
constexpr int64_t kAlone = 1 << 14;  // elements below which waking threads costs more
constexpr float kPad = -1e37f;       // a logit that no distribution notices
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

typedef float Stored __attribute__((vector_size(64), aligned(4), may_alias));

PKT_ELEMENTWISE Lanes load(const float* from) {
  return *reinterpret_cast<const Stored*>(from);
}
PKT_ELEMENTWISE void store(float* to, Lanes lanes) {
  *reinterpret_cast<Stored*>(to) = lanes;
}

PKT_ELEMENTWISE double sum_of(Lanes lanes) {
  double sum = 0.0;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

// ---- Blocks of kBlock values. Those that check return 0, or NaN where a value is not finite.

template <typename T>
PKT_SIMD_CLONES void widen(const T* from, float* to) {
  for (int64_t j = 0; j < kBlock; ++j) to[j] = to_float(from[j]);
}

PKT_SIMD_CLONES double check(const float* values) {
  Lanes finite = {};
  for (int64_t j = 0; j < kBlock; j += kLanes) finite += load(values + j) * 0.0f;
  return sum_of(finite);
}

PKT_SIMD_CLONES double apply_cap(float* values, float cap) {
  Lanes finite = {};
  for (int64_t j = 0; j < kBlock; j += kLanes) {
    const Lanes value = load(values + j);
    finite += value * 0.0f;
    store(values + j, cap * tanh_of(value / cap));
  }
  return sum_of(finite);
}

// Adds exp((v - top) / tau) and, given `student`, exp(..) (student - v).
template <bool kWeighted>
PKT_SIMD_CLONES void add_exponentials(const float* values, const float* student, float rate,
                                      Online& online) {
  Lanes tops = load(values);
  for (int64_t j = kLanes; j < kBlock; j += kLanes) {
    const Lanes value = load(values + j);
    tops = value > tops ? value : tops;
  }
  float above = tops[0];
  for (int64_t lane = 1; lane < kLanes; ++lane) above = tops[lane] > above ? tops[lane] : above;
  online.raise(above, rate);
  const float top = online.top;
  Lanes sum = {}, weighted = {};
  for (int64_t j = 0; j < kBlock; j += kLanes) {
    const Lanes value = load(values + j);
    const Lanes power = exp2_of((value - top) * rate);
    sum += power;
    if constexpr (kWeighted) weighted += power * (load(student + j) - value);
  }
  online.sum += sum_of(sum);
  if constexpr (kWeighted) online.weighted += sum_of(weighted);
}

struct KlRow {
  Softmax student, teacher;
  float inverse_temperature, log_shares, temperature, cap;
};

template <bool kCapped>
PKT_SIMD_CLONES double kl_block(float* student, const float* teacher, const KlRow& row) {
  const KlRow r = row;  // which stores to the block cannot change
  Lanes loss = {};
  for (int64_t j = 0; j < kBlock; j += kLanes) {
    const Lanes logit = load(student + j);
    const Divergence<Lanes> d = divergence(logit, load(teacher + j), r.student, r.teacher,
                                           r.inverse_temperature, r.log_shares);
    loss += d.loss;
    const Lanes slope = r.temperature * d.slope;
    store(student + j, kCapped ? slope * cap_slope(logit, r.cap) : slope);
  }
  return sum_of(loss);
}

template <bool kCapped>
PKT_SIMD_CLONES double fisher_block(float* student, const float* teacher, const Softmax& softmax,
                                    float mean, float cap) {
  const Softmax p = softmax;
  Lanes loss = {};
  for (int64_t j = 0; j < kBlock; j += kLanes) {
    const Lanes logit = load(student + j), target = load(teacher + j);
    const Lanes apart = (logit - target) - mean;
    const Lanes slope = exp2_of((target - p.top) * p.rate) * p.share * apart;
    loss += slope * apart;
    store(student + j, kCapped ? slope * cap_slope(logit, cap) : slope);
  }
  return sum_of(loss);
}

template <bool kCapped>
PKT_SIMD_CLONES void softmax_block(float* logits, const Softmax& softmax, float cap) {
  const Softmax q = softmax;
  for (int64_t j = 0; j < kBlock; j += kLanes) {
    const Lanes logit = load(logits + j);
    const Lanes prob = exp2_of((logit - q.top) * q.rate) * q.share;
    store(logits + j, kCapped ? prob * cap_slope(logit, cap) : prob);
  }
}

PKT_SIMD_CLONES double squares(const float* values) {
  Lanes sum = {};
  for (int64_t j = 0; j < kBlock; j += kLanes) sum += load(values + j) * load(values + j);
  return sum_of(sum);
}

template <bool kCapped>
PKT_SIMD_CLONES void scale_block(float* logits, float factor, float cap) {
  for (int64_t j = 0; j < kBlock; j += kLanes) {
    const Lanes logit = load(logits + j);
    store(logits + j, factor * (kCapped ? logit * cap_slope(logit, cap) : logit));
  }
}

// ---- Rows.

// One row of the problem: hands out its blocks whole, capped and in float32.
template <typename T>
class Row {
 public:
  Row(const AlignmentRowsParams& p, int64_t row)
      : p_(p),
        logits_(p.logits + row * p.logit_stride),
        targets_(static_cast<const T*>(p.targets) + row * p.target_stride),
        pad_(p.which == RowLoss::kCosineOneHot ? 0.0f : kPad) {}

  // The logits from `left` on, where they lie or, fewer than a block, copied to `space`. The first
  // pass caps them.
  float* first(int64_t left, float* space) {
    float* const block = take(left, space, 0.0f);
    if (p_.cap > 0.0f) finite_ += apply_cap(block, p_.cap);
    pad(left, block);
    return block;
  }
  float* second(int64_t left, float* space) { return take(left, space, pad_); }

  // After either, where the block was changed.
  void put_back(int64_t left, const float* block) {
    if (block != logits_ + left) std::copy_n(block, p_.columns - left, logits_ + left);
  }

  const float* targets(int64_t left, float* space) {
    const T* const from = targets_ + left;
    const bool whole = left + kBlock <= p_.columns;
    if constexpr (std::is_same_v<T, float>) {
      if (whole && !(p_.target_cap > 0.0f)) return from;
    }
    if (whole) {
      widen(from, space);
    } else {
      std::fill_n(space, kBlock, 0.0f);
      for (int64_t j = 0; left + j < p_.columns; ++j) space[j] = to_float(from[j]);
    }
    if (p_.target_cap > 0.0f) finite_ += apply_cap(space, p_.target_cap);
    pad(left, space);
    return space;
  }

  // NaN unless all values that were checked are finite.
  void add_check(double finite) { finite_ += finite; }

  // The row's loss, or NaN in its place and in the gradient's.
  float finish(double loss) {
    const float rounded = static_cast<float>(loss + finite_);
    if (std::isfinite(rounded)) return rounded;
    std::fill_n(logits_, p_.columns, kNaN);
    return kNaN;
  }

 private:
  float* take(int64_t left, float* space, float beyond) {
    const int64_t rest = p_.columns - left;
    if (rest >= kBlock) return logits_ + left;
    std::copy_n(logits_ + left, rest, space);
    std::fill_n(space + rest, kBlock - rest, beyond);
    return space;
  }
  void pad(int64_t left, float* block) {
    const int64_t rest = p_.columns - left;
    if (rest < kBlock) std::fill_n(block + rest, kBlock - rest, pad_);
  }

  const AlignmentRowsParams& p_;
  float* const logits_;
  const T* const targets_;
  const float pad_;
  double finite_ = 0.0;
};

template <typename T>
float kl_row(const AlignmentRowsParams& p, int64_t index) {
  Row<T> row(p, index);
  const float rate = kLog2e / p.temperature;
  float space[kBlock], target_space[kBlock];
  Online student, teacher;
  for (int64_t left = 0; left < p.columns; left += kBlock) {
    float* const block = row.first(left, space);
    add_exponentials<false>(block, nullptr, rate, student);
    add_exponentials<false>(row.targets(left, target_space), nullptr, rate, teacher);
    row.put_back(left, block);
  }
  const KlRow found{student.softmax(rate), teacher.softmax(rate),
                    1.0f / p.temperature,  static_cast<float>(std::log(student.sum / teacher.sum)),
                    p.temperature,         p.cap};
  double loss = 0.0;
  for (int64_t left = 0; left < p.columns; left += kBlock) {
    float* const block = row.second(left, space);
    const float* const targets = row.targets(left, target_space);
    loss += p.cap > 0.0f ? kl_block<true>(block, targets, found)
                         : kl_block<false>(block, targets, found);
    row.put_back(left, block);
  }
  return row.finish(loss * p.temperature * p.temperature);
}

template <typename T>
float fisher_row(const AlignmentRowsParams& p, int64_t index) {
  Row<T> row(p, index);
  const float rate = kLog2e / p.temperature;
  float space[kBlock], target_space[kBlock];
  Online online;
  for (int64_t left = 0; left < p.columns; left += kBlock) {
    float* const block = row.first(left, space);
    add_exponentials<true>(row.targets(left, target_space), block, rate, online);
    row.put_back(left, block);
  }
  const Softmax softmax = online.softmax(rate);
  const float mean = static_cast<float>(online.weighted / online.sum);
  double loss = 0.0;
  for (int64_t left = 0; left < p.columns; left += kBlock) {
    float* const block = row.second(left, space);
    const float* const targets = row.targets(left, target_space);
    loss += p.cap > 0.0f ? fisher_block<true>(block, targets, softmax, mean, p.cap)
                         : fisher_block<false>(block, targets, softmax, mean, p.cap);
    row.put_back(left, block);
  }
  return row.finish(0.5 * loss);
}

float cross_entropy_row(const AlignmentRowsParams& p, int64_t index) {
  Row<float> row(p, index);
  const int64_t label = p.labels[index];
  float space[kBlock];
  Online others;  // without the label: where it has nearly all the probability, nothing cancels
  float chosen = 0.0f;
  for (int64_t left = 0; left < p.columns; left += kBlock) {
    float* const block = row.first(left, space);
    if (!(p.cap > 0.0f)) row.add_check(check(block));
    const bool inside = label >= left && label < left + kBlock;
    if (inside) chosen = std::exchange(block[label - left], kPad);
    add_exponentials<false>(block, nullptr, kLog2e, others);
    if (inside) block[label - left] = chosen;
    row.put_back(left, block);
  }
  const Choice choice = choose(chosen, others);
  for (int64_t left = 0; left < p.columns; left += kBlock) {
    float* const block = row.second(left, space);
    p.cap > 0.0f ? softmax_block<true>(block, choice.all, p.cap)
                 : softmax_block<false>(block, choice.all, p.cap);
    row.put_back(left, block);
  }
  const float slope = p.cap > 0.0f ? cap_slope(chosen, p.cap) : 1.0f;
  p.logits[index * p.logit_stride + label] = -choice.missing * slope;
  return row.finish(choice.loss);
}

float cosine_one_hot_row(const AlignmentRowsParams& p, int64_t index) {
  Row<float> row(p, index);
  float* const logits = p.logits + index * p.logit_stride;
  const int64_t label = p.labels[index];
  float space[kBlock];
  double square = 0.0;
  for (int64_t left = 0; left < p.columns; left += kBlock) {
    float* const block = row.first(left, space);
    square += squares(block);
    row.put_back(left, block);
  }
  const float chosen = logits[label];
  const OneHotCosine found = one_hot_cosine(chosen, square);
  for (int64_t left = 0; left < p.columns; left += kBlock) {
    float* const block = row.second(left, space);
    p.cap > 0.0f ? scale_block<true>(block, found.factor, p.cap)
                 : scale_block<false>(block, found.factor, p.cap);
    row.put_back(left, block);
  }
  logits[label] = found.at_label * (p.cap > 0.0f ? cap_slope(chosen, p.cap) : 1.0f);
  return row.finish(found.loss);
}

float row_loss(const AlignmentRowsParams& p, int64_t row) {
  if (p.which == RowLoss::kCrossEntropy) return cross_entropy_row(p, row);
  if (p.which == RowLoss::kCosineOneHot) return cosine_one_hot_row(p, row);
  float loss = kNaN;
  with_float_type(p.target_dtype, [&](auto type) {
    using T = decltype(type);
    loss = p.which == RowLoss::kKl ? kl_row<T>(p, row) : fisher_row<T>(p, row);
  });
  return loss;
}

}  // namespace

void alignment_rows_cpu(const AlignmentRowsParams& p, int threads) {
  const int used = p.rows * p.columns < kAlone ? 1 : threads;
  parallel_for(used, p.rows, [&](int64_t row) { p.loss[row] = row_loss(p, row); });
}

}  // namespace pkt
