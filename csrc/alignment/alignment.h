// SPDX-License-Identifier: Apache-2.0
// Losses that compare rows of logits or of hidden states, with their gradients.
//
// Row losses over logits z [rows, columns], in place: the gradient of the rows' loss takes the
// logits' place. With c(z) = cap tanh(z / cap) (or z), p = softmax(c(t) / tau), q = softmax(c(z) /
// tau), D = c(z) - c(t) and a label y:
//   kKl            tau^2 sum p log(p / q)                    tau (q - p) c'
//   kFisher        (sum p D^2 - (sum p D)^2) / 2  (A9)       p (D - sum p D) c'
//   kCosineOneHot  1 - c_y / |c|  (A8)                       (c c_y / |c|^2 - 1_y) / |c| c'
//   kCrossEntropy  log sum exp(c) - c_y                      (q - 1_y) c', tau = 1
// The cosine of hidden states (METHODS A7) has a forward and a backward kernel: 1 - s.t / (|s| |t|)
// and its gradient by s. A zero norm, in either cosine, gives loss 1 and gradient 0.
//
// A row with a NaN or an infinity (or one that float32 forms on the way: logits past 1e37, norms
// past 1e19) has a NaN loss and a gradient of NaN; its neighbours are not touched.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/dtype.h"

namespace pkt {

enum class RowLoss { kKl, kFisher, kCosineOneHot, kCrossEntropy };

struct AlignmentRowsParams {
  RowLoss which;
  float* loss;            // [rows], contiguous
  float* logits;          // [rows, columns], rows `logit_stride` apart
  const void* targets;    // [rows, columns], rows `target_stride` apart: t of kKl and kFisher
  const int64_t* labels;  // [rows], contiguous: y of the others
  DType target_dtype;
  int64_t rows, columns, logit_stride, target_stride;
  float temperature;
  float cap, target_cap;  // 0: none

  bool has_targets() const { return which == RowLoss::kKl || which == RowLoss::kFisher; }
};

// A row's 1 - s.t / (|s| |t|), and the factors of its gradient.
struct Cosine {
  float loss, by_target, by_state;
};

PKT_HOST_DEVICE Cosine cosine_of(double dot, double state_square, double target_square) {
  const double squares = state_square * target_square;
  if (squares == 0.0) return {1.0f, 0.0f, 0.0f};
  const double norms = sqrt(squares);
  return {static_cast<float>(1.0 - dot / norms), static_cast<float>(-1.0 / norms),
          static_cast<float>(dot / norms / state_square)};
}

struct CosineRowsParams {
  float* loss;     // [rows], contiguous
  float* factors;  // [rows, 2], contiguous: what the gradient multiplies targets and states with
  const void* states;
  const void* targets;  // [rows, columns] both
  DType state_dtype, target_dtype;
  int64_t rows, columns, state_stride, target_stride;  // strides: of rows
};

// gradient = loss_gradient (factors[0] targets + factors[1] states)
struct CosineRowsBackwardParams {
  void* gradient;              // [rows, columns], contiguous, of the states' dtype
  const float* loss_gradient;  // [rows], contiguous
  CosineRowsParams forward;    // `loss` is not read
};

void alignment_rows_cpu(const AlignmentRowsParams& params, int threads);
void alignment_rows_cuda(const AlignmentRowsParams& params, void* stream);

void cosine_rows_cpu(const CosineRowsParams& params, int threads);
void cosine_rows_cuda(const CosineRowsParams& params, void* stream);

void cosine_rows_backward_cpu(const CosineRowsBackwardParams& params, int threads);
void cosine_rows_backward_cuda(const CosineRowsBackwardParams& params, void* stream);

}  // namespace pkt
