// SPDX-License-Identifier: Apache-2.0
#include "alignment/alignment.h"
#include "core/binding.h"

namespace pkt {
namespace {

void check_rows(const TensorView& view, const char* name) {
  if (view.shape[1] > 1 && view.stride[1] != 1 && view.numel() > 0) {
    throw py::value_error(std::string(name) + ": expected contiguous rows, got strides [" +
                          std::to_string(view.stride[0]) + ", " + std::to_string(view.stride[1]) +
                          "]");
  }
}

// Float32 [rows], contiguous, where `other` lies.
float* view_floats(py::handle tensor, const char* name, int64_t rows, const TensorView& other) {
  const TensorView v = view(tensor, name, 1, {DType::f32});
  check_shape(v, name, {rows});
  check_contiguous(v, name);
  check_device(v, name, other);
  return static_cast<float*>(v.data);
}

void alignment_rows(RowLoss which, py::handle loss, py::handle logits, py::handle targets,
                    py::handle labels, double temperature, double cap, double target_cap,
                    int threads, uintptr_t stream) {
  AlignmentRowsParams p{};
  p.which = which;
  const TensorView z = view(logits, "logits", 2, {DType::f32});
  check_rows(z, "logits");
  if (z.shape[0] > 1 && z.stride[0] < z.shape[1]) {
    throw py::value_error("logits: rows overlap, their stride is " + std::to_string(z.stride[0]) +
                          " for " + std::to_string(z.shape[1]) + " columns");
  }
  p.logits = static_cast<float*>(z.data);
  p.rows = z.shape[0];
  p.columns = z.shape[1];
  p.logit_stride = z.stride[0];
  p.loss = view_floats(loss, "loss", p.rows, z);
  if (p.has_targets()) {
    const TensorView t = view(targets, "targets", 2, {DType::f32, DType::f16, DType::bf16});
    check_shape(t, "targets", {p.rows, p.columns});
    check_rows(t, "targets");
    check_device(t, "targets", z);
    p.targets = t.data;
    p.target_dtype = t.dtype;
    p.target_stride = t.stride[0];
  } else {
    const TensorView y = view(labels, "labels", 1, {DType::i64});
    check_shape(y, "labels", {p.rows});
    check_contiguous(y, "labels");
    check_device(y, "labels", z);
    p.labels = static_cast<const int64_t*>(y.data);
  }
  p.temperature = static_cast<float>(temperature);
  p.cap = static_cast<float>(cap);
  p.target_cap = static_cast<float>(target_cap);
  if (z.numel() == 0) return;
  PKT_DISPATCH("alignment", z, alignment_rows_cpu(p, threads),
               alignment_rows_cuda(p, reinterpret_cast<void*>(stream)));
}

TensorView view_states(py::handle tensor, const char* name) {
  const TensorView v = view(tensor, name, 2, {DType::f32, DType::f16, DType::bf16});
  check_rows(v, name);
  return v;
}

CosineRowsParams view_cosine(py::handle factors, const TensorView& states, py::handle targets) {
  CosineRowsParams p{};
  p.states = states.data;
  p.state_dtype = states.dtype;
  p.rows = states.shape[0];
  p.columns = states.shape[1];
  p.state_stride = states.stride[0];
  const TensorView t = view_states(targets, "targets");
  check_shape(t, "targets", {p.rows, p.columns});
  check_device(t, "targets", states);
  p.targets = t.data;
  p.target_dtype = t.dtype;
  p.target_stride = t.stride[0];
  const TensorView f = view(factors, "factors", 2, {DType::f32});
  check_shape(f, "factors", {p.rows, 2});
  check_contiguous(f, "factors");
  check_device(f, "factors", states);
  p.factors = static_cast<float*>(f.data);
  return p;
}

void cosine_rows(py::handle loss, py::handle factors, py::handle states, py::handle targets,
                 int threads, uintptr_t stream) {
  const TensorView s = view_states(states, "states");
  CosineRowsParams p = view_cosine(factors, s, targets);
  p.loss = view_floats(loss, "loss", p.rows, s);
  if (p.rows == 0) return;
  PKT_DISPATCH("alignment", s, cosine_rows_cpu(p, threads),
               cosine_rows_cuda(p, reinterpret_cast<void*>(stream)));
}

void cosine_rows_backward(py::handle gradient, py::handle loss_gradient, py::handle factors,
                          py::handle states, py::handle targets, int threads, uintptr_t stream) {
  CosineRowsBackwardParams q{};
  const TensorView s = view_states(states, "states");
  q.forward = view_cosine(factors, s, targets);
  q.loss_gradient = view_floats(loss_gradient, "loss_gradient", q.forward.rows, s);
  const TensorView g = view(gradient, "gradient (of the states' dtype)", 2, {s.dtype});
  check_shape(g, "gradient", {q.forward.rows, q.forward.columns});
  check_contiguous(g, "gradient");
  check_device(g, "gradient", s);
  q.gradient = g.data;
  if (g.numel() == 0) return;
  PKT_DISPATCH("alignment", s, cosine_rows_backward_cpu(q, threads),
               cosine_rows_backward_cuda(q, reinterpret_cast<void*>(stream)));
}

template <RowLoss kWhich>
void rows_to_targets(py::handle loss, py::handle logits, py::handle targets, double temperature,
                     double cap, double target_cap, int threads, uintptr_t stream) {
  alignment_rows(kWhich, loss, logits, targets, py::none(), temperature, cap, target_cap, threads,
                 stream);
}

template <RowLoss kWhich>
void rows_to_labels(py::handle loss, py::handle logits, py::handle labels, double cap, int threads,
                    uintptr_t stream) {
  alignment_rows(kWhich, loss, logits, py::none(), labels, 1.0, cap, 0.0, threads, stream);
}

}  // namespace

void bind_alignment(py::module_& m) {
  const auto to_targets = [&m](const char* name, auto function) {
    m.def(name, function, py::arg("loss"), py::arg("logits"), py::arg("targets"),
          py::arg("temperature"), py::arg("cap"), py::arg("target_cap"), py::arg("threads"),
          py::arg("stream"));
  };
  to_targets("kl_rows", &rows_to_targets<RowLoss::kKl>);
  to_targets("fisher_rows", &rows_to_targets<RowLoss::kFisher>);
  const auto to_labels = [&m](const char* name, auto function) {
    m.def(name, function, py::arg("loss"), py::arg("logits"), py::arg("labels"), py::arg("cap"),
          py::arg("threads"), py::arg("stream"));
  };
  to_labels("cosine_onehot_rows", &rows_to_labels<RowLoss::kCosineOneHot>);
  to_labels("cross_entropy_rows", &rows_to_labels<RowLoss::kCrossEntropy>);
  m.def("cosine_rows", &cosine_rows, py::arg("loss"), py::arg("factors"), py::arg("states"),
        py::arg("targets"), py::arg("threads"), py::arg("stream"));
  m.def("cosine_rows_backward", &cosine_rows_backward, py::arg("gradient"),
        py::arg("loss_gradient"), py::arg("factors"), py::arg("states"), py::arg("targets"),
        py::arg("threads"), py::arg("stream"));
}

}  // namespace pkt
