// SPDX-License-Identifier: Apache-2.0
#include "core/binding.h"
#include "sensitivity/sensitivity.h"

namespace pkt {
namespace {

constexpr std::initializer_list<DType> kFloats = {DType::f32, DType::f16, DType::bf16};

// The score, or where there is none the weight whose shape it would have.
TensorView view_shape(py::handle score, py::handle weight) {
  if (score.is_none()) return view(weight, "weight", 2, kFloats);
  const TensorView s = view(score, "score", 2, {DType::f32});
  check_contiguous(s, "score");
  return s;
}

TensorView view_weight(py::handle weight, const TensorView& score) {
  const TensorView w = view(weight, "weight", 2, kFloats);
  check_shape(w, "weight", {score.shape[0], score.shape[1]});
  check_device(w, "weight", score);
  return w;
}

float* score_data(py::handle score, const TensorView& view) {
  return score.is_none() ? nullptr : static_cast<float*>(view.data);
}

// The fields of a SensitivitySums object (see ops/sensitivity.py); None: no sums.
SensitivitySums view_sums(py::handle sums, const TensorView& score) {
  SensitivitySums out{};
  if (sums.is_none()) return out;
  const auto field = [&](const char* name, DType dtype,
                         std::initializer_list<int64_t> shape) -> void* {
    const py::object tensor = sums.attr(name);
    if (tensor.is_none()) return nullptr;
    const std::string label = std::string("sums.") + name;
    const TensorView v = view(tensor, label.c_str(), static_cast<int>(shape.size()), {dtype});
    check_shape(v, label.c_str(), shape);
    check_contiguous(v, label.c_str());
    check_device(v, label.c_str(), score);
    return v.data;
  };
  const int64_t rows = score.shape[0], cols = score.shape[1];
  const auto blocks = [](int64_t size) { return (size + kSumBlock - 1) / kSumBlock; };
  out.rows = static_cast<double*>(field("rows", DType::f64, {rows}));
  out.cols = static_cast<double*>(field("cols", DType::f64, {cols}));
  out.blocks = static_cast<double*>(field("blocks", DType::f64, {blocks(rows), blocks(cols)}));
  out.total = static_cast<double*>(field("total", DType::f64, {}));
  out.nonfinite = static_cast<int32_t*>(field("nonfinite", DType::i32, {}));
  return out;
}

// `workspace` may be a function that makes one of so many bytes, and is that one then.
void* workspace_data(py::object& workspace, int64_t bytes, const TensorView& score) {
  if (PyCallable_Check(workspace.ptr())) workspace = workspace(bytes);
  const TensorView space = view(workspace, "workspace", 1, {DType::u8});
  check_shape(space, "workspace", {bytes});
  check_contiguous(space, "workspace");
  check_device(space, "workspace", score);
  return space.data;
}

struct Elementwise {
  TensorView score;
  AccumulateSensitivityParams params;

  bool nothing_to_do() const { return score.numel() == 0; }
};

Elementwise describe(py::handle score, py::handle weight, py::handle grad, py::handle sums) {
  const TensorView s = view_shape(score, weight);
  const TensorView w = view_weight(weight, s);
  const TensorView g = view(grad, "grad", 2, kFloats);
  check_shape(g, "grad", {s.shape[0], s.shape[1]});
  check_device(g, "grad", s);
  AccumulateSensitivityParams p{};
  p.score = score_data(score, s);
  p.weight = w.data;
  p.grad = g.data;
  p.weight_dtype = w.dtype;
  p.grad_dtype = g.dtype;
  p.rows = s.shape[0];
  p.cols = s.shape[1];
  p.weight_row_stride = w.stride[0];
  p.weight_col_stride = w.stride[1];
  p.grad_row_stride = g.stride[0];
  p.grad_col_stride = g.stride[1];
  p.sums = view_sums(sums, s);
  return Elementwise{s, p};
}

int64_t workspace_bytes(const Elementwise& e) {
  if (e.nothing_to_do()) return 0;
  int64_t bytes = 0;
  PKT_DISPATCH("accumulate_sensitivity_", e.score,
               bytes = accumulate_sensitivity_workspace_cpu(e.params),
               bytes = accumulate_sensitivity_workspace_cuda(e.params));
  return bytes;
}

int64_t accumulate_workspace(py::handle score, py::handle weight, py::handle grad, py::handle sums,
                             int, uintptr_t) {
  return workspace_bytes(describe(score, weight, grad, sums));
}

void accumulate_sensitivity(py::handle score, py::handle weight, py::handle grad, py::handle sums,
                            py::object workspace, int threads, uintptr_t stream) {
  Elementwise e = describe(score, weight, grad, sums);
  if (e.nothing_to_do()) return;
  e.params.workspace = workspace_data(workspace, workspace_bytes(e), e.score);
  PKT_DISPATCH("accumulate_sensitivity_", e.score, accumulate_sensitivity_cpu(e.params, threads),
               accumulate_sensitivity_cuda(e.params, reinterpret_cast<void*>(stream)));
}

struct Linear {
  TensorView score;
  LinearSensitivityParams params;

  bool nothing_to_do() const {
    return score.numel() == 0 || params.rows == 0 || params.segment_count < 1;
  }
};

Linear describe(py::handle score, py::handle weight, py::handle inputs, py::handle grad_outputs,
                py::handle segments, py::handle sums, int variant) {
  const TensorView s = view_shape(score, weight);
#if defined(PKT_EXT_WITH_CUDA) && !defined(PKT_EXT_HOPPER)
  if (variant == 3 && s.device >= 0) {
    PyErr_SetString(PyExc_NotImplementedError,
                    "linear_sensitivity_: variant 3 needs sm_90a, for which this build of pkt_ext "
                    "has no code; reinstall with 90a among PKT_EXT_CUDA_ARCHS");
    throw py::error_already_set();
  }
#endif
  const TensorView w = view_weight(weight, s);
  const TensorView x = view(inputs, "inputs", 2, kFloats);
  check_shape(x, "inputs", {x.shape[0], s.shape[1]});
  check_device(x, "inputs", s);
  const TensorView d = view(grad_outputs, "grad_outputs (of the inputs' dtype)", 2, {x.dtype});
  check_shape(d, "grad_outputs", {x.shape[0], s.shape[0]});
  check_device(d, "grad_outputs", s);
  const TensorView n = view(segments, "segments", 1, {DType::i64});
  check_contiguous(n, "segments");
  check_device(n, "segments", s);
  LinearSensitivityParams p{};
  p.score = score_data(score, s);
  p.weight = w.data;
  p.inputs = x.data;
  p.grad_outputs = d.data;
  p.segments = static_cast<const int64_t*>(n.data);
  p.weight_dtype = w.dtype;
  p.dtype = x.dtype;
  p.rows = x.shape[0];
  p.in_features = s.shape[1];
  p.out_features = s.shape[0];
  p.segment_count = n.shape[0] - 1;
  p.weight_row_stride = w.stride[0];
  p.weight_col_stride = w.stride[1];
  p.inputs_row_stride = x.stride[0];
  p.inputs_col_stride = x.stride[1];
  p.grads_row_stride = d.stride[0];
  p.grads_col_stride = d.stride[1];
  p.sums = view_sums(sums, s);
  p.variant = variant;
  return Linear{s, p};
}

int64_t workspace_bytes(const Linear& l, int threads) {
  if (l.nothing_to_do()) return 0;
  int64_t bytes = 0;
  PKT_DISPATCH("linear_sensitivity_", l.score,
               bytes = linear_sensitivity_workspace_cpu(l.params, threads),
               bytes = linear_sensitivity_workspace_cuda(l.params));
  return bytes;
}

int64_t linear_workspace(py::handle score, py::handle weight, py::handle inputs,
                         py::handle grad_outputs, py::handle segments, py::handle sums, int threads,
                         uintptr_t, int variant) {
  return workspace_bytes(describe(score, weight, inputs, grad_outputs, segments, sums, variant),
                         threads);
}

void linear_sensitivity(py::handle score, py::handle weight, py::handle inputs,
                        py::handle grad_outputs, py::handle segments, py::handle sums,
                        py::object workspace, int threads, uintptr_t stream, int variant) {
  Linear l = describe(score, weight, inputs, grad_outputs, segments, sums, variant);
  if (l.nothing_to_do()) return;
  l.params.workspace = workspace_data(workspace, workspace_bytes(l, threads), l.score);
  PKT_DISPATCH("linear_sensitivity_", l.score, linear_sensitivity_cpu(l.params, threads),
               linear_sensitivity_cuda(l.params, reinterpret_cast<void*>(stream)));
}

}  // namespace

void bind_sensitivity(py::module_& m) {
  m.def("accumulate_sensitivity_workspace", &accumulate_workspace, py::arg("score"),
        py::arg("weight"), py::arg("grad"), py::arg("sums"), py::arg("threads"), py::arg("stream"));
  m.def("accumulate_sensitivity", &accumulate_sensitivity, py::arg("score"), py::arg("weight"),
        py::arg("grad"), py::arg("sums"), py::arg("workspace"), py::arg("threads"),
        py::arg("stream"));
  m.def("linear_sensitivity_workspace", &linear_workspace, py::arg("score"), py::arg("weight"),
        py::arg("inputs"), py::arg("grad_outputs"), py::arg("segments"), py::arg("sums"),
        py::arg("threads"), py::arg("stream"), py::arg("variant") = -1);
  m.def("linear_sensitivity", &linear_sensitivity, py::arg("score"), py::arg("weight"),
        py::arg("inputs"), py::arg("grad_outputs"), py::arg("segments"), py::arg("sums"),
        py::arg("workspace"), py::arg("threads"), py::arg("stream"), py::arg("variant") = -1);
}

}  // namespace pkt
