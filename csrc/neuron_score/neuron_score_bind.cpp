// SPDX-License-Identifier: Apache-2.0
#include "core/binding.h"
#include "neuron_score/neuron_score.h"

namespace pkt {
namespace {

// What both kernels take; `columns` are the tokens of the panel or of the head.
NeuronScoreParams view_score(const TensorView& sums, py::handle tokens, py::handle neurons,
                             double cap, int64_t columns) {
  NeuronScoreParams p{};
  p.samples = sums.shape[0];
  p.rows = sums.shape[1];
  p.columns = columns;
  p.cap = static_cast<float>(cap);
  const TensorView t = view(tokens, "tokens", 3, {DType::f32});
  check_shape(t, "tokens", {p.samples, cap > 0.0 ? 4 : 2, columns});
  check_device(t, "tokens", sums);
  if (columns > 1 && t.stride[2] != 1) {
    throw py::value_error("tokens: expected the last stride to be 1, got " +
                          std::to_string(t.stride[2]));
  }
  const TensorView n = view(neurons, "neurons", 3, {DType::f32});
  check_shape(n, "neurons", {p.samples, 2, p.rows});
  check_contiguous(n, "neurons");
  check_device(n, "neurons", sums);
  p.sums = static_cast<double*>(sums.data);
  p.tokens = static_cast<const float*>(t.data);
  p.neurons = static_cast<const float*>(n.data);
  p.token_sample_stride = t.stride[0];
  p.token_plane_stride = t.stride[1];
  return p;
}

TensorView view_sums(py::handle sums) {
  const TensorView s = view(sums, "sums", 2, {DType::f64});
  check_contiguous(s, "sums");
  return s;
}

void neuron_panel(py::handle sums, py::handle panel, py::handle tokens, py::handle neurons,
                  double cap, int threads, uintptr_t stream) {
  const TensorView s = view_sums(sums);
  const TensorView a = view(panel, "panel", 2, {DType::f32});
  check_shape(a, "panel", {s.shape[1], a.shape[1]});
  check_device(a, "panel", s);
  if (a.shape[1] > 1 && a.stride[1] != 1) {
    throw py::value_error("panel: expected contiguous rows, got strides " +
                          std::to_string(a.stride[0]) + ", " + std::to_string(a.stride[1]));
  }
  NeuronPanelParams p{};
  p.score = view_score(s, tokens, neurons, cap, a.shape[1]);
  p.panel = static_cast<const float*>(a.data);
  p.panel_stride = a.stride[0];
  if (s.numel() == 0 || a.numel() == 0) return;
  PKT_DISPATCH("neuron_log_prob_gain", s, neuron_panel_cpu(p, threads),
               neuron_panel_cuda(p, reinterpret_cast<void*>(stream)));
}

[[maybe_unused]] void refuse_on_cpu() {
  throw std::invalid_argument("neuron_product: the CPU has neuron_panel instead");
}

// Whether `neuron_product` can take a head of this dtype where `head` lies.
bool neuron_product_takes(py::handle head, int, uintptr_t, bool wgmma) {
  [[maybe_unused]] const NeuronProduct which = wgmma ? NeuronProduct::kWgmma : NeuronProduct::kMma;
  const TensorView h = view(head, "head", 2, {DType::f32, DType::f16, DType::bf16});
  bool takes = false;
  if (h.dtype == DType::f32) return takes;
  PKT_DISPATCH("neuron_log_prob_gain", h, takes = false, takes = neuron_product_runs(which));
  return takes;
}

// `workspace` is called with the float32 values it must have.
void neuron_product(py::handle sums, py::handle weights, py::handle head, py::handle tokens,
                    py::handle neurons, double cap, py::object workspace, int, uintptr_t stream,
                    bool wgmma) {
  const NeuronProduct which = wgmma ? NeuronProduct::kWgmma : NeuronProduct::kMma;
  const TensorView s = view_sums(sums);
  const TensorView h = view(head, "head", 2, {DType::f16, DType::bf16});
  const TensorView w = view(weights, "weights (of the head's dtype)", 3, {h.dtype});
  check_shape(w, "weights", {2, s.shape[1], (h.shape[1] + 31) / 32 * 32});
  check_contiguous(w, "weights");
  check_device(w, "weights", s);
  check_device(h, "head", s);
  if (h.stride[1] != 1 || h.stride[0] % 8 != 0 || reinterpret_cast<uintptr_t>(h.data) % 16 != 0) {
    throw py::value_error(
        "head: expected rows that are contiguous and start at multiples of 16 "
        "bytes, got strides " +
        std::to_string(h.stride[0]) + ", " + std::to_string(h.stride[1]));
  }
  NeuronProductParams p{};
  p.score = view_score(s, tokens, neurons, cap, h.shape[0]);
  p.weights = w.data;
  p.head = h.data;
  p.dtype = h.dtype;
  p.depth = w.shape[2];
  p.head_depth = h.shape[1];
  p.head_stride = h.stride[0];
  if (s.numel() == 0 || h.shape[0] == 0) return;
  const int64_t values = neuron_product_grid(p.score, which).workspace(p.score);
  workspace = workspace(values);
  const TensorView space = view(workspace, "workspace", 1, {DType::f32});
  check_shape(space, "workspace", {values});
  check_contiguous(space, "workspace");
  check_device(space, "workspace", s);
  p.workspace = static_cast<float*>(space.data);
  PKT_DISPATCH("neuron_log_prob_gain", s, refuse_on_cpu(),
               neuron_product_cuda(p, which, reinterpret_cast<void*>(stream)));
}

}  // namespace

void bind_neuron_score(py::module_& m) {
  m.def("neuron_panel", &neuron_panel, py::arg("sums"), py::arg("panel"), py::arg("tokens"),
        py::arg("neurons"), py::arg("cap"), py::arg("threads"), py::arg("stream"));
  m.def("neuron_product_takes", &neuron_product_takes, py::arg("head"), py::arg("threads"),
        py::arg("stream"), py::arg("wgmma") = false);
  m.def("neuron_product", &neuron_product, py::arg("sums"), py::arg("weights"), py::arg("head"),
        py::arg("tokens"), py::arg("neurons"), py::arg("cap"), py::arg("workspace"),
        py::arg("threads"), py::arg("stream"), py::arg("wgmma") = false);
}

}  // namespace pkt
